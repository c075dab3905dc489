"""Where the windows lie on a map: padding, cyclic shift, partition and masks as index arithmetic over any axes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import constant, plain_eager, surely

SHIFT_MASK = -100.0  # the official value: finite, so a large position bias is felt through it
PADDING_MASK = -1000.0  # Twins' segmentation code


def padding_value(x: Tensor, window: Sequence[int], project: Callable[[Tensor], Tensor]) -> Tensor | None:
    """What a token of zeros, with which a map is padded to whole windows, has after `project`; None without padding.

    The official codes pad before the projection. Found by calling it, whatever layer it is by now, on one such token.

    Args:
        x: the map (B, *spatial, C).
        project: (..., C) -> (..., C').

    Returns:
        (C',) or None.
    """
    sizes = zip(x.shape[1:-1], window, strict=True)
    if x.shape[0] == 0 or all(surely(whole_length(length, side) == length) for length, side in sizes):
        return None
    # a token of the map in form alone, so that hooks of the projection find an input with a gradient as of the map
    token = x[(0,) * (x.dim() - 1)].view((1,) * (x.dim() - 1) + x.shape[-1:])
    return project(token.masked_fill(token.new_ones((), dtype=torch.bool), 0.0)).flatten()


def whole_length(length: int, side: int) -> int:
    """The least multiple of `side` that is not under `length`; without modulo, which symbols do not simplify."""
    return (length + side - 1) // side * side


def at_least(length: int, side: int) -> int:
    """The larger one, without a branch, where `length` is a symbol or, to `torch.jit.trace`, a tensor."""
    if isinstance(length, Tensor):
        return length.clamp(min=side)
    # dynamo has symbols for `max`, and no numbers for `torch.sym_max`
    return torch.sym_max(length, side) if isinstance(length, torch.SymInt) else max(length, side)


def at_most(length: int, side: int) -> int:
    """The smaller one, as `at_least`."""
    if isinstance(length, Tensor):
        return length.clamp(max=side)
    symbols = isinstance(length, torch.SymInt) or isinstance(side, torch.SymInt)
    return torch.sym_min(length, side) if symbols else min(length, side)


def pad_map(x: Tensor, window: Sequence[int], value: Tensor | None = None) -> Tensor:
    """Pad the end of each axis of (B, *spatial, C) to multiples of `window` with `value` (C,), by default zeros."""
    return pad_to(x, [whole_length(length, side) for length, side in zip(x.shape[1:-1], window, strict=True)], value)


def pad_to(x: Tensor, wholes: Sequence[int], value: Tensor | None = None) -> Tensor:
    """Pad the end of each axis of (B, *spatial, C) to the lengths `wholes` with `value` (C,), by default zeros."""
    sizes = list(zip(x.shape[1:-1], wholes, strict=True))
    if all(surely(whole == length) for length, whole in sizes):
        return x
    known = [surely(whole == length) or surely(whole > length) for length, whole in sizes]
    if value is None and all(known):
        ends = [(0, whole - length) for length, whole in reversed(sizes)]
        return F.pad(x, (0, 0, *itertools.chain.from_iterable(ends)))
    for axis, (length, whole) in enumerate(sizes, start=1):
        if surely(whole == length):
            continue
        shape = list(x.shape)
        shape[axis] = whole - length if known[axis - 1] else 1
        filling = x.new_zeros(shape)
        if value is not None:
            filling = filling + value.to(x.dtype)
        x = torch.cat([x, filling], dim=axis)
        if not known[axis - 1]:  # a filling whose length is a symbol would be a graph for 0, one for 1, one for others
            x = x.index_select(axis, torch.arange(whole, device=x.device).clamp(max=length))
    return x


def crop_map(x: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Undo `pad_map`."""
    for axis, length in enumerate(spatial, start=1):
        if not surely(x.shape[axis] == length):
            x = x.narrow(axis, 0, length)
    return x


def window_partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """View (B, *spatial, ...) as (B, *windows, *window, ...), the axes of the grid first; no copy."""
    axes = len(window)
    for axis, side in enumerate(window):
        x = x.unflatten(2 * axis + 1, (x.shape[2 * axis + 1] // side, side))
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order)


def window_reverse(x: Tensor, axes: int) -> Tensor:
    """Undo `window_partition`: (B, *windows, *window, ...) -> (B, *spatial, ...)."""
    order = [0]
    for axis in range(1, axes + 1):
        order += [axis, axes + axis]
    x = x.permute(*order, *range(2 * axes + 1, x.dim()))
    for axis in range(1, axes + 1):
        x = x.flatten(axis, axis + 1)
    return x


class WindowGrid:
    """How one call of window attention partitions its map, for the implementations that work on the windows.

    Args:
        shape: of qkv, (B, *spatial, 3 * C).
    """

    def __init__(self, shape: torch.Size, window: tuple[int, ...], shift: tuple[int, ...], num_heads: int) -> None:
        self.window, self.shift, self.num_heads = window, shift, num_heads
        self.batch, self.spatial = shape[0], tuple(shape[1:-1])
        self.axes = len(window)
        self.grid = tuple((length + side - 1) // side for length, side in zip(self.spatial, window, strict=True))
        self.windows, self.tokens = math.prod(self.grid), math.prod(window)
        self.logits = self.batch * self.windows * num_heads * self.tokens**2

    @property
    def padded(self) -> bool:
        return any(length % side for length, side in zip(self.spatial, self.window, strict=True))

    def partition(self, qkv: Tensor, pad_value: Tensor | None) -> Tensor:
        """(B, *spatial, 3 * C) -> (3, B, windows, heads, N, head_dim): pad, roll, and cut in one copy."""
        x = pad_map(qkv, self.window, pad_value)
        if any(self.shift):
            x = torch.roll(x, [-shift for shift in self.shift], tuple(range(1, self.axes + 1)))
        x = window_partition(x.unflatten(-1, (3, self.num_heads, -1)), self.window)
        inner = 2 * self.axes + 1  # (B, *grid, *window, 3, heads, head_dim): where the 3 stands
        x = x.permute(inner, 0, *range(1, self.axes + 1), inner + 1, *range(self.axes + 1, inner), inner + 2)
        return x.reshape(3, self.batch, self.windows, self.num_heads, self.tokens, x.shape[-1])

    def reverse(self, x: Tensor) -> Tensor:
        """B * windows * heads sequences (..., N, head_dim) -> (B, *spatial, C): put together, roll back, crop."""
        x = x.reshape(self.batch, *self.grid, self.num_heads, *self.window, x.shape[-1])
        before, heads = range(self.axes + 1), self.axes + 1  # (B, *grid, heads, *window, head_dim)
        x = x.permute(*before, *range(heads + 1, x.dim() - 1), heads, x.dim() - 1)
        x = window_reverse(x, self.axes).flatten(-2)
        if any(self.shift):
            x = torch.roll(x, self.shift, tuple(range(1, self.axes + 1)))
        return crop_map(x, self.spatial)


def _window_tokens(per_axis: list[Tensor], window: tuple[int, ...]) -> Tensor:
    """Spread one label per position of each axis over the map and cut it up: (windows, N, axes)."""
    grid = torch.stack(torch.meshgrid(*per_axis, indexing="ij"), dim=-1)
    return window_partition(grid[None], window).reshape(-1, math.prod(window), len(window))


@constant()
def window_mask(
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    mask_padding: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What is added to the logits of each window of the padded and shifted map: (windows, N, N).

    After the cyclic shift the last window of an axis holds positions from both ends of the map. They are told apart
    by one comparison per axis, and attend only to their own side. With `mask_padding` no token attends to padding.
    """
    wrapped, padding = token_regions(spatial, window, shift, device)
    return windows_mask(wrapped, padding if mask_padding else None, dtype)


def token_regions(
    spatial: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each token of each window: which borders of the map it was rolled over, as a number, and whether it is hidden
    as padding, where that is asked for.

    Returns:
        (windows, N) each.
    """
    sides, padding = [], []
    for axis, (length, side, offset) in enumerate(zip(spatial, window, shift, strict=True)):
        padded = (length + side - 1) // side * side
        position = torch.arange(padded, device=device)
        sides.append((position >= padded - offset if offset else position < 0).long() * 2**axis)
        padding.append((position + offset) % padded >= length)
    hidden = _window_tokens(padding, window).any(-1)
    for along_axis in padding:  # see `mask_padding` of `window_attention`
        hidden = hidden & along_axis.any()
    return _window_tokens(sides, window).sum(-1), hidden


def windows_mask(wrapped: Tensor, padding: Tensor | None, dtype: torch.dtype, queries: slice = slice(None)) -> Tensor:
    """The rows `queries` of the masks of windows whose tokens have these `token_regions`: (windows, queries, N)."""
    mask = (wrapped[:, queries, None] != wrapped[:, None]).to(dtype) * SHIFT_MASK
    return mask if padding is None else mask + padding.to(dtype)[:, None] * PADDING_MASK


def cosine(q: Tensor, k: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., N, head_dim) whose product is the cosine of the given ones, times `logit_scale`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    long_q, long_k = (F.normalize(tensor.to(wide), dim=-1) for tensor in (q, k))
    return (long_q * logit_scale).to(q.dtype), long_k.to(k.dtype)


@functools.lru_cache(maxsize=64)
def distinct_windows(
    spatial: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], mask_padding: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A map with the fewest windows that has every mask of this one, and for each window of this one its place there.

    Masks differ from zero only in the last windows of an axis: in the last one of a shifted axis, and in the last two
    where padding is masked.
    """
    smaller, places = [], [0]
    for length, side, offset in zip(spatial, window, shift, strict=True):
        grid = (length + side - 1) // side
        kept = min(grid, 3 if mask_padding else 2 if offset else 1)
        smaller.append(length - (grid - kept) * side)
        places = [place * kept + max(0, i - grid + kept) for place in places for i in range(grid)]
    return tuple(smaller), tuple(places)


@constant()
def _places_on(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def every_mask(
    spatial: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    mask_padding: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`window_mask`, of which only what differs is kept between calls: in video all masks are a hundred megabytes."""
    if not plain_eager():  # sizes may be symbols
        return window_mask(spatial, window, shift, mask_padding, dtype, device)
    smaller, places = distinct_windows(spatial, window, shift, mask_padding)
    masks = window_mask(smaller, window, shift, mask_padding, dtype, device)
    return masks if len(masks) == len(places) else masks.index_select(0, _places_on(places, device))
