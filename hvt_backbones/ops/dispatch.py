"""Choice of the implementation of window attention: the first that can take a call, or as the user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from ..errors import InputError
from . import cpu
from .reference import reference
from .sdpa import sdpa


class Implementation(NamedTuple):
    """
    Attributes:
        attend: takes all arguments of `window_attention`, checked.
        refuses: takes its tensors, qkv first: why it cannot take such a call, or None.
    """

    attend: Callable[..., Tensor]
    refuses: Callable[..., str | None]


def _takes_all(*tensors: Tensor | None) -> None:
    pass


# asked in turn; the first that can takes the call
IMPLEMENTATIONS = {
    "bmm": Implementation(cpu.bmm, cpu.refuses),
    "sdpa": Implementation(sdpa, _takes_all),
    "reference": Implementation(reference, _takes_all),
}
_chosen: str | None = None  # a plain global, which a compiler can read


def _checked(name: str, where: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise InputError(f"{where} is {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return name


def choose(*tensors: Tensor | None) -> str:
    """The implementation for a call with these, qkv first: the one that is asked for, else the first that can.

    Raises:
        InputError: the one that is asked for cannot, or there is none of the name.
    """
    if name := _chosen or os.environ.get("HVT_ATTENTION"):
        if reason := IMPLEMENTATIONS[_checked(name, "HVT_ATTENTION")].refuses(*tensors):
            raise InputError(f"window attention by {name!r} is asked for, but {reason}: choose another, or none")
        return name
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.refuses(*tensors) is None:
            return name
    raise AssertionError("the last takes all")


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
        InputError: the shapes do not fit together, or the implementation that is asked for cannot take the call,
            or there is none of the name.
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
    return IMPLEMENTATIONS[choose(qkv, bias, logit_scale, pad_value)].attend(
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
