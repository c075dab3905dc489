"""Maps partitioned into shifted windows and put together again, each in one copy.

Neither the cyclic shift nor the padding costs a copy of the map: shifted windows are copied from where they lie on it,
and padding is written into the windows alone.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..windows import WindowGrid

Piece = tuple[int, int, int, int, int]  # along an axis: start on the map, first window, windows, start and length there


def _along(length: int, grid: int, side: int, shift: int) -> tuple[list[Piece], list[Piece]]:
    """One axis in pieces that lie in one stretch both on the map and in its shifted windows; and those of padding."""
    last = grid - 1
    pieces = [(0, 0, grid, 0, side)]
    if shift:
        # the last window wraps: its beginning is the padded map's end, its end the map's beginning
        pieces = [
            (shift, 0, last, 0, side),
            (shift + last * side, last, 1, 0, side - shift),
            (0, last, 1, side - shift, shift),
        ]
    real, padding = [], []
    for start, first, count, offset, extent in pieces:
        whole = min(count, max(0, (length - start - extent) // side + 1))
        if whole:
            real.append((start, first, whole, offset, extent))
        for i in range(whole, count):
            begin = start + i * side
            inside = min(extent, max(0, length - begin))
            if inside:
                real.append((begin, first + i, 1, offset, inside))
            padding.append((begin + inside, first + i, 1, offset + inside, extent - inside))
    return real, padding


def _axes(grid: WindowGrid) -> list[tuple[list[Piece], list[Piece]]]:
    return [_along(*axis) for axis in zip(grid.spatial, grid.grid, grid.window, grid.shift, strict=True)]


def _pairs(maps: Tensor, windows: Tensor, grid: WindowGrid) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same numbers on the maps (K, B, *spatial, heads, dim) and in (K, B, *grid, heads, *window, dim).

    Strides are worked out here: narrowing and splitting axis by axis would take longer than the copies.
    """
    axes, map_strides, strides = grid.axes, maps.stride(), windows.stride()
    on_axes, in_grid, in_window = map_strides[2 : 2 + axes], strides[2 : 2 + axes], strides[3 + axes : -1]
    steps = [side * stride for side, stride in zip(grid.window, on_axes, strict=True)]
    for piece in itertools.product(*(real for real, _ in _axes(grid))):
        starts, firsts, counts, offsets, lengths = zip(*piece, strict=True)
        size = (*windows.shape[:2], *counts, windows.shape[2 + axes], *lengths, windows.shape[-1])
        yield (
            maps.as_strided(
                size,
                (*map_strides[:2], *steps, map_strides[-2], *on_axes, map_strides[-1]),
                maps.storage_offset() + sum(map(operator.mul, starts, on_axes)),
            ),
            windows.as_strided(
                size,
                strides,
                windows.storage_offset() + sum(map(operator.mul, (*firsts, *offsets), (*in_grid, *in_window))),
            ),
        )


def _padding(windows: Tensor, grid: WindowGrid) -> Iterator[Tensor]:
    """Views of the padding in the windows (K, B, *grid, heads, *window, dim), each of its tokens once."""
    pieces = _axes(grid)
    for axis, (_, padding) in enumerate(pieces):
        for piece in itertools.product(*(real for real, _ in pieces[:axis]), padding):
            view = windows
            for i, (_, first, count, offset, length) in enumerate(piece):
                view = view.narrow(2 + i, first, count).narrow(3 + grid.axes + i, offset, length)
            yield view


def _partition(maps: Tensor, padding: Tensor | None, grid: WindowGrid) -> Tensor:
    shape = (*maps.shape[:2], *grid.grid, grid.num_heads, *grid.window, maps.shape[-1])
    windows = maps.new_empty(shape)
    for on_map, in_windows in _pairs(maps, windows, grid):
        in_windows.copy_(on_map)
    if grid.padded:
        ones = (1,) * grid.axes
        value = None if padding is None else padding.view(-1, 1, *ones, grid.num_heads, *ones, maps.shape[-1])
        for view in _padding(windows, grid):
            view.zero_() if value is None else view.copy_(value)
    return windows


def _reverse(windows: Tensor, grid: WindowGrid) -> Tensor:
    # K is innermost but for heads and dim on a map of queries, keys and values, as the projection wrote it
    shape = (windows.shape[1], *grid.spatial, windows.shape[0], grid.num_heads, windows.shape[-1])
    maps = windows.new_empty(shape).movedim(-3, 0)
    for on_map, in_windows in _pairs(maps, windows, grid):
        on_map.copy_(in_windows)
    return maps


class Partition(torch.autograd.Function):
    """Maps (K, B, *spatial, heads, dim) into shifted windows (K, B, *grid, heads, *window, dim); `Reverse` undoes it.

    Padding is of `padding` (K, heads, dim), or zeros. Written out because autograd would keep and add up a gradient of
    the whole for each piece that is copied.
    """

    @staticmethod
    def forward(maps: Tensor, padding: Tensor | None, grid: WindowGrid) -> Tensor:
        return _partition(maps, padding, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, WindowGrid], output: Tensor) -> None:
        ctx.grid = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_padding = None
        if ctx.needs_input_grad[1]:
            axes = ctx.grid.axes
            summed = (*range(1, 2 + axes), *range(3 + axes, 3 + 2 * axes))
            of_padding = functools.reduce(torch.add, (view.sum(summed) for view in _padding(grad, ctx.grid)))
        return Reverse.apply(grad, ctx.grid), of_padding, None


class Reverse(torch.autograd.Function):
    """The inverse of `Partition`; padding is left out."""

    @staticmethod
    def forward(windows: Tensor, grid: WindowGrid) -> Tensor:
        return _reverse(windows, grid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, WindowGrid], output: Tensor) -> None:
        ctx.grid = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Partition.apply(grad, None, ctx.grid), None
