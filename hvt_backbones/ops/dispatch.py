"""Choice of the implementation of window attention: the first that can take a call, or as the user says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import InputError
from . import cpu
from . import reference as plain
from . import sdpa as fused
from .eager import symbolic
from .gather import gather
from .sequential import BiasTable, sequential_windows
from .windows import WindowGrid


class Implementation(NamedTuple):
    """
    Attributes:
        attend: takes all arguments of `window_attention`, checked.
        refuses: takes its tensors, qkv first: why it cannot take such a call, or None.
        attend_part: what `sequential` calls instead of it where the logits are more than `max_logits`.
        is_for: takes qkv: whether it is worth to be chosen unasked.
    """

    attend: Callable[..., Tensor]
    refuses: Callable[..., str | None]
    attend_part: Callable[..., Tensor]
    is_for: Callable[[Tensor], bool] = lambda qkv: True


def _takes_all(*tensors: Tensor | None) -> None:
    pass


# asked in turn; the first that can, and is for it, takes the call
IMPLEMENTATIONS = {
    "bmm": Implementation(cpu.bmm, cpu.refuses, plain.attend),
    "gather": Implementation(gather, _takes_all, fused.attend, symbolic),
    "sdpa": Implementation(fused.sdpa, _takes_all, fused.attend),
    "reference": Implementation(plain.reference, _takes_all, plain.attend),
}
_chosen: str | None = None  # a plain global, which a compiler can read


def _checked(name: str, where: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise InputError(f"{where} is {name!r}: choose one of {', '.join(IMPLEMENTATIONS)}")
    return name


def choose(qkv: Tensor, *others: Tensor | None) -> str:
    """The implementation for a call with these: the one that is asked for, else the first that can.

    Raises:
        InputError: the one that is asked for cannot, or there is none of the name.
    """
    if name := _chosen or os.environ.get("HVT_ATTENTION"):
        if reason := IMPLEMENTATIONS[_checked(name, "HVT_ATTENTION")].refuses(qkv, *others):
            raise InputError(f"window attention by {name!r} is asked for, but {reason}: choose another, or none")
        return name
    for name, implementation in IMPLEMENTATIONS.items():
        if implementation.refuses(qkv, *others) is None and implementation.is_for(qkv):
            return name
    raise AssertionError("the last takes all")


def takes_extent(x: Tensor) -> bool:
    """Whether windows on the map `x` keep their places in a graph in which its lengths are symbols."""
    return symbolic(x) and choose(x) == "gather"


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
    bias: Tensor | BiasTable | None,
    window_size: tuple[int, ...],
    shift_size: tuple[int, ...],
    num_heads: int,
    *,
    scale: float | None = None,
    logit_scale: Tensor | None = None,
    pad_value: Tensor | None = None,
    mask_padding: bool = False,
    dropout_p: float = 0.0,
    max_logits: int | None = None,
    extent: tuple[int, ...] | None = None,
) -> Tensor:
    """Multi-head self-attention inside (shifted) windows of a map, over two or three axes.

    The map is padded at its end to whole windows, rolled by `-shift_size`, cut into windows, attended, put together,
    rolled back and cropped (Swin, arXiv:2103.14030, Sec. 3.2; Video Swin, arXiv:2106.13230, Sec. 3.2).

    Args:
        qkv: (B, *spatial, 3 * C): query, key and value, each as `num_heads` groups of channels.
        bias: (num_heads, N, N) added to the logits, N = prod(window_size); or a table, of which only the parts that
            are needed are made; or None.
        window_size: tokens per window along each axis; may exceed the map, which is then padded.
        shift_size: cyclic shift along each axis, less than the window; tokens that come from opposite borders of the
            map get -100 on their logits, as in the official code.
        num_heads: must divide C.
        scale: factor on the logits; default `head_dim ** -0.5`. Ignored with `logit_scale`.
        logit_scale: (num_heads,) or (num_heads, 1, 1): cosine similarity times this instead of the dot product
            (SwinV2, arXiv:2111.09883, Sec. 3.2).
        pad_value: (3 * C,) what padded tokens carry: the projection's bias, as the official code pads before it.
        mask_padding: add -1000 to the logits of padded tokens (Twins' segmentation code) instead of attending to them,
            where every axis is padded: that code marks padding as `[-pad:]`, the whole axis where there is none, so
            that all tokens look alike and none is hidden.
        dropout_p: dropout on the attention weights.
        max_logits: attend part by part where there are more logits, so that no tensor of logits, nor of what is added
            to them or has their gradients, has more numbers than this, or than the N of one query; forward and
            backward, which makes them once more (see `sequential`). A `bias` that is no table is there as a whole.
        extent: where `takes_extent`: along each axis, how many tokens of a window there are on this map, at most as
            many as `window_size` has places for; lengths and shifts may then be symbols.

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
    if extent is None and any(not 0 <= shift < side for shift, side in zip(shift_size, window_size, strict=True)):
        raise InputError(f"shift_size {shift_size} must be at least 0 and less than window_size {window_size}")
    if scale is None:
        scale = (channels // (3 * num_heads)) ** -0.5
    window, shift = tuple(window_size), tuple(shift_size)
    table = bias.table if isinstance(bias, BiasTable) else bias
    implementation = IMPLEMENTATIONS[choose(qkv, table, logit_scale, pad_value)]
    options: dict[str, Any] = {
        "scale": scale,
        "logit_scale": logit_scale,
        "pad_value": pad_value,
        "mask_padding": mask_padding,
        "dropout_p": dropout_p,
    }
    if extent is not None:
        options["extent"] = extent
    if max_logits is not None and WindowGrid(qkv.shape, window, shift, num_heads).logits > max_logits:
        return sequential_windows(
            implementation.attend_part, max_logits, qkv, bias, window, shift, num_heads, **options
        )
    whole = bias[:, :] if isinstance(bias, BiasTable) else bias
    return implementation.attend(qkv, whole, window, shift, num_heads, **options)
