"""Window attention through batched matrix products, for the CPU.

A window is a short sequence. `scaled_dot_product_attention` tiles it as if it were long, or scales, masks and checks
for empty rows in passes of their own; here the first product scales, and one pass adds bias and mask together. The
cyclic shift costs nothing: shifted windows are copied from where they lie on the map, not from a rolled copy of it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import WindowLayout, crop_map, pad_map, window_mask


def bmm(
    qkv: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, ...],
    shift_size: tuple[int, ...],
    num_heads: int,
    *,
    scale: float,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    mask_padding: bool,
    dropout_p: float,
) -> Tensor:
    layout = WindowLayout(qkv.shape, window_size, shift_size, num_heads)
    x = pad_map(qkv, window_size, pad_value).unflatten(-1, (3, num_heads, -1)).movedim(-3, 0)
    windows = Cut.apply(x, layout)
    per_head = (layout.batch, layout.windows, num_heads)
    q, k, v = windows.view(3, *per_head, layout.tokens, windows.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is not None:
        q = (F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide).view(num_heads, 1, 1)).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        scale = 1.0
    if any(shift_size) or mask_padding:
        mask = window_mask(layout.spatial, window_size, shift_size, mask_padding, wide, qkv.device)[:, None]
        bias = mask if bias is None else bias + mask

    q, k, v = (t.flatten(0, 2) for t in (q, k, v))
    unread = q.new_empty(1, 1, 1)  # beta = 0: the call is there for its factor alpha, which costs nothing
    logits = torch.baddbmm(unread, q, k.mT, beta=0, alpha=scale).to(wide)
    if bias is not None:
        logits.view(*per_head, layout.tokens, layout.tokens).add_(bias)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    attended = torch.bmm(weights.to(v.dtype), v).view(1, *windows.shape[1:])
    return crop_map(Join.apply(attended, layout)[0].flatten(-2), layout.spatial)


def _pieces(layout: WindowLayout) -> Iterator[tuple[tuple[int, int, int, int, int], ...]]:
    """The map in pieces that lie in one stretch both on it and in its shifted windows.

    Yields for each axis: start on the map, first window, windows, start in the window, length in the window.
    """

    def along(grid: int, side: int, shift: int) -> list[tuple[int, int, int, int, int]]:
        if shift == 0:
            return [(0, 0, grid, 0, side)]
        last = grid - 1  # this window wraps: its beginning is the map's end, its end the map's beginning
        pieces = [
            (shift, 0, last, 0, side),
            (shift + last * side, last, 1, 0, side - shift),
            (0, last, 1, side - shift, shift),
        ]
        return pieces if last else pieces[1:]

    return itertools.product(*map(along, layout.grid, layout.window, layout.shift))


def _pairs(maps: Tensor, windows: Tensor, layout: WindowLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same numbers on the maps (K, B, *padded, heads, dim) and in (K, B, *grid, heads, *window, dim).

    Strides are worked out here: narrowing and splitting axis by axis would take longer than the copies.
    """
    axes, map_strides, strides = layout.axes, maps.stride(), windows.stride()
    on_axes, in_grid, in_window = map_strides[2 : 2 + axes], strides[2 : 2 + axes], strides[3 + axes : -1]
    for piece in _pieces(layout):
        starts, firsts, counts, offsets, lengths = zip(*piece, strict=True)
        size = (*windows.shape[:2], *counts, windows.shape[2 + axes], *lengths, windows.shape[-1])
        between = (length * stride for length, stride in zip(lengths, on_axes, strict=True))
        yield (
            maps.as_strided(
                size,
                (*map_strides[:2], *between, map_strides[-2], *on_axes, map_strides[-1]),
                maps.storage_offset() + sum(map(operator.mul, starts, on_axes)),
            ),
            windows.as_strided(
                size,
                strides,
                windows.storage_offset() + sum(map(operator.mul, (*firsts, *offsets), (*in_grid, *in_window))),
            ),
        )


def _cut(maps: Tensor, layout: WindowLayout) -> Tensor:
    shape = (*maps.shape[:2], *layout.grid, layout.num_heads, *layout.window, maps.shape[-1])
    windows = maps.new_empty(shape)
    for on_map, in_windows in _pairs(maps, windows, layout):
        in_windows.copy_(on_map)
    return windows


def _join(windows: Tensor, layout: WindowLayout) -> Tensor:
    padded = (grid * side for grid, side in zip(layout.grid, layout.window, strict=True))
    # K is innermost but for heads and dim on a map of queries, keys and values, as the projection wrote it
    shape = (windows.shape[1], *padded, windows.shape[0], layout.num_heads, windows.shape[-1])
    maps = windows.new_empty(shape).movedim(-3, 0)
    for on_map, in_windows in _pairs(maps, windows, layout):
        on_map.copy_(in_windows)
    return maps


class Cut(torch.autograd.Function):
    """Maps (K, B, *padded, heads, dim) into shifted windows (K, B, *grid, heads, *window, dim); `Join` undoes it.

    Written out because autograd would keep and add up a gradient of the whole for each piece that is copied.
    """

    @staticmethod
    def forward(maps: Tensor, layout: WindowLayout) -> Tensor:
        return _cut(maps, layout)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, WindowLayout], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Join.apply(grad, ctx.layout), None


class Join(torch.autograd.Function):
    """The inverse of `Cut`."""

    @staticmethod
    def forward(windows: Tensor, layout: WindowLayout) -> Tensor:
        return _join(windows, layout)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, WindowLayout], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Cut.apply(grad, ctx.layout), None
