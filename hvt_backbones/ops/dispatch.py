"""Choice of the implementation of window attention: by device, or as the user says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ..errors import InputError
from ..layers.eager import has_tangent, plain_eager
from .bmm import bmm
from .reference import reference
from .sdpa import sdpa

IMPLEMENTATIONS = {"reference": reference, "sdpa": sdpa, "bmm": bmm}
_chosen: str | None = None  # a plain global, which a compiler can read


def _checked(name: str, where: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise InputError(f"{where} is {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return name


def _default(*tensors: Tensor | None) -> str:
    # a compiler fuses sdpa's steps itself, and nothing can look into the autograd functions of bmm
    on_cpu = tensors[0].device.type == "cpu"
    return "bmm" if on_cpu and plain_eager() and not has_tangent(*tensors) else "sdpa"


@contextmanager
def use_attention(name: str) -> Iterator[None]:
    """Use the named implementation inside the `with` block, in all threads.

    Raises:
        InputError: there is no such implementation.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "use_attention")
    try:
        yield
    finally:
        _chosen = before


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, ...],
    shift_size: tuple[int, ...],
    num_heads: int,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_value: Tensor | None = None,
    mask_padding: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Multi-head self-attention inside (shifted) windows of a map, over two or three axes.

    The map is padded at its end to whole windows, rolled by `-shift_size`, cut into windows, attended, put together,
    rolled back and cropped (Swin, arXiv:2103.14030, Sec. 3.2; Video Swin, arXiv:2106.13230, Sec. 3.2).

    Args:
        qkv: (B, *spatial, 3 * C): query, key and value, each as `num_heads` groups of channels.
        bias: (num_heads, N, N) added to the logits, N = prod(window_size); or None.
        window_size: tokens per window along each axis; may exceed the map, which is then padded.
        shift_size: cyclic shift along each axis, less than the window; tokens that come from opposite borders of the
            map get -100 on their logits, as in the official code.
        num_heads: must divide C.
        scale: factor on the logits; default `head_dim ** -0.5`. Ignored with `logit_scale`.
        logit_scale: (num_heads,) or (num_heads, 1, 1): cosine similarity times this instead of the dot product
            (SwinV2, arXiv:2111.09883, Sec. 3.2).
        pad_value: (3 * C,) what padded tokens carry: the projection's bias, as the official code pads before it.
        mask_padding: add -1000 to the logits of padded tokens (Twins' segmentation code) instead of attending to them.
        dropout_p: dropout on the attention weights.

    Returns:
        (B, *spatial, C). The softmax is taken in float32 or wider whatever the dtype of `qkv`.

    Raises:
        InputError: the shapes do not fit together, or `HVT_ATTENTION` names no implementation.
    """
    channels, axes = qkv.shape[-1], qkv.dim() - 2
    if len(window_size) != axes or len(shift_size) != axes:
        raise InputError(f"a map of {axes} axes needs as many in window_size {window_size} and shift_size {shift_size}")
    if channels % (3 * num_heads):
        raise InputError(f"{channels} channels of qkv are not 3 x {num_heads} heads of equal width")
    if any(not 0 <= shift < side for shift, side in zip(shift_size, window_size, strict=True)):
        raise InputError(f"shift_size {shift_size} must be at least 0 and less than window_size {window_size}")
    if scale is None:
        scale = (channels // (3 * num_heads)) ** -0.5
    name = _chosen or os.environ.get("HVT_ATTENTION") or _default(qkv, bias, logit_scale, pad_value)
    _checked(name, "HVT_ATTENTION")
    return IMPLEMENTATIONS[name](
        qkv,
        bias,
        tuple(window_size),
        tuple(shift_size),
        num_heads,
        scale=scale,
        logit_scale=logit_scale,
        pad_value=pad_value,
        mask_padding=mask_padding,
        dropout_p=dropout_p,
    )
