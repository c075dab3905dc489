"""Window attention through batched matrix products, for the CPU.

A window is a short sequence. `scaled_dot_product_attention` tiles it as if it were long, or scales, masks and checks
for empty rows in passes of their own; here the first product scales, and bias and mask are added in place. Neither the
cyclic shift nor the padding costs a copy of the map: shifted windows are copied from where they lie on it, and padding
is written into the windows alone. Where no gradient is wanted, a few windows are attended at a time, in the cache.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import WindowLayout, window_mask

CHUNK = 2**19  # logits that are made at a time without gradients: 2 MiB of float32


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
    maps = qkv.unflatten(-1, (3, num_heads, -1)).movedim(-3, 0)
    padding = None if pad_value is None or not layout.padded else pad_value.to(qkv.dtype).view(3, num_heads, -1)
    windows = Cut.apply(maps, padding, layout)
    mask = None
    if any(shift_size) or mask_padding:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        mask = window_mask(layout.spatial, window_size, shift_size, mask_padding, wide, qkv.device)[:, None]

    shape = (3, layout.batch, layout.windows, num_heads, layout.tokens, windows.shape[-1])
    q, k, v = windows.view(shape)
    given = (windows, bias, logit_scale)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        attended = _attend(q, k, v, bias, mask, scale, logit_scale, dropout_p)
    else:
        attended = q
        for images, few in _chunks(layout):
            part = q[images, few], k[images, few], v[images, few]
            masked = None if mask is None else mask[few]
            attended[images, few] = _attend(*part, bias, masked, scale, logit_scale, dropout_p)
    return Join.apply(attended.view(1, *windows.shape[1:]), layout)[0].flatten(-2)


def _chunks(layout: WindowLayout) -> Iterator[tuple[slice, slice]]:
    """Images and windows whose logits are about `CHUNK` numbers: several images, or a part of one."""
    count = max(1, CHUNK // (layout.num_heads * layout.tokens**2))
    images = max(1, count // layout.windows)
    for image in range(0, layout.batch, images):
        for window in range(0, layout.windows, count):
            yield slice(image, image + images), slice(window, window + count)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    logit_scale: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Queries, keys and values (B, windows, heads, N, head_dim), mask (windows, 1, N, N) -> as the queries."""
    shape, tokens = q.shape, q.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is not None:
        q = (F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide).view(-1, 1, 1)).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        scale = 1.0
    q, k, v = (t.flatten(0, 2) for t in (q, k, v))
    unread = q.new_empty(1, 1, 1)  # beta = 0: the call is there for its factor alpha, which costs nothing
    logits = torch.baddbmm(unread, q, k.mT, beta=0, alpha=scale).to(wide)
    for term in (bias, mask):
        if term is not None:
            logits.view(*shape[:3], tokens, tokens).add_(term)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    return torch.bmm(weights.to(v.dtype), v).view(shape)


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


def _axes(layout: WindowLayout) -> list[tuple[list[Piece], list[Piece]]]:
    return [_along(*axis) for axis in zip(layout.spatial, layout.grid, layout.window, layout.shift, strict=True)]


def _pairs(maps: Tensor, windows: Tensor, layout: WindowLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same numbers on the maps (K, B, *spatial, heads, dim) and in (K, B, *grid, heads, *window, dim).

    Strides are worked out here: narrowing and splitting axis by axis would take longer than the copies.
    """
    axes, map_strides, strides = layout.axes, maps.stride(), windows.stride()
    on_axes, in_grid, in_window = map_strides[2 : 2 + axes], strides[2 : 2 + axes], strides[3 + axes : -1]
    steps = [side * stride for side, stride in zip(layout.window, on_axes, strict=True)]
    for piece in itertools.product(*(real for real, _ in _axes(layout))):
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


def _padding(windows: Tensor, layout: WindowLayout) -> Iterator[Tensor]:
    """Views of the padding in the windows (K, B, *grid, heads, *window, dim), each of its tokens once."""
    pieces = _axes(layout)
    for axis, (_, padding) in enumerate(pieces):
        for piece in itertools.product(*(real for real, _ in pieces[:axis]), padding):
            view = windows
            for i, (_, first, count, offset, length) in enumerate(piece):
                view = view.narrow(2 + i, first, count).narrow(3 + layout.axes + i, offset, length)
            yield view


def _cut(maps: Tensor, padding: Tensor | None, layout: WindowLayout) -> Tensor:
    shape = (*maps.shape[:2], *layout.grid, layout.num_heads, *layout.window, maps.shape[-1])
    windows = maps.new_empty(shape)
    for on_map, in_windows in _pairs(maps, windows, layout):
        in_windows.copy_(on_map)
    if layout.padded:
        ones = (1,) * layout.axes
        value = 0.0 if padding is None else padding.view(-1, 1, *ones, layout.num_heads, *ones, maps.shape[-1])
        for view in _padding(windows, layout):
            view.zero_() if padding is None else view.copy_(value)
    return windows


def _join(windows: Tensor, layout: WindowLayout) -> Tensor:
    # K is innermost but for heads and dim on a map of queries, keys and values, as the projection wrote it
    shape = (windows.shape[1], *layout.spatial, windows.shape[0], layout.num_heads, windows.shape[-1])
    maps = windows.new_empty(shape).movedim(-3, 0)
    for on_map, in_windows in _pairs(maps, windows, layout):
        on_map.copy_(in_windows)
    return maps


class Cut(torch.autograd.Function):
    """Maps (K, B, *spatial, heads, dim) into shifted windows (K, B, *grid, heads, *window, dim); `Join` undoes it.

    Padding is of `padding` (K, heads, dim), or zeros. Written out because autograd would keep and add up a gradient of
    the whole for each piece that is copied.
    """

    @staticmethod
    def forward(maps: Tensor, padding: Tensor | None, layout: WindowLayout) -> Tensor:
        return _cut(maps, padding, layout)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor | None, WindowLayout], output: Tensor) -> None:
        ctx.layout = inputs[2]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_padding = None
        if ctx.needs_input_grad[1]:
            axes = ctx.layout.axes
            summed = (*range(1, 2 + axes), *range(3 + axes, 3 + 2 * axes))
            of_padding = sum(view.sum(summed) for view in _padding(grad, ctx.layout))
        return Join.apply(grad, ctx.layout), of_padding, None


class Join(torch.autograd.Function):
    """The inverse of `Cut`; padding is left out."""

    @staticmethod
    def forward(windows: Tensor, layout: WindowLayout) -> Tensor:
        return _join(windows, layout)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, WindowLayout], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return Cut.apply(grad, None, ctx.layout), None
