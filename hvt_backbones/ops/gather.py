"""Window attention for graphs that are for maps of every size: one gather cuts windows out, one puts them together.

A graph whose sizes are symbols asks of each tensor whether an axis has length 1 and whether its memory is contiguous. A
grid of windows, padding and cropping have other answers for other maps, and each would be a graph of its own. Here
tokens are numbered instead, and no tensor has an axis of windows alone.

Where windows shrink to small maps, they keep their places here, whose number is no symbol; the map is cut by their
`extent`, of so many tokens along each axis, and the places beyond it are hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import surely
from .sdpa import attend
from .windows import PADDING_MASK, SHIFT_MASK, cosine


def _divide(number: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder; ONNX's exporter takes no remainder by a symbol."""
    quotient = number // size
    return quotient, number - quotient * size


def _split(number: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The coordinates of places on a map of `sizes`, numbered row by row."""
    found = []
    for size in reversed(sizes[1:]):
        number, rest = _divide(number, size)
        found.append(rest)
    return [number, *found[::-1]]


def _join(coordinates: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Undo `_split`."""
    number = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        number = number * size + coordinate
    return number


def gather(
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
    extent: tuple[int, ...] | None = None,
) -> Tensor:
    batch, *spatial, channels = qkv.shape
    device, tokens, places = qkv.device, math.prod(window_size), math.prod(spatial)
    extents = window_size if extent is None else extent
    grid = [(length + side - 1) // side for length, side in zip(spatial, extents, strict=True)]
    wholes = [number * side for number, side in zip(grid, extents, strict=True)]
    sequences = math.prod(grid) * num_heads

    # of each token of each head of each window, (sequences, tokens): where it is on the rolled map, and on the map
    of_window, of_head = _divide(torch.arange(sequences, device=device), num_heads)
    corners = _split(of_window[:, None], grid)
    inners = _split(torch.arange(tokens, device=device), window_size)
    rolled = [corner * side + at for corner, side, at in zip(corners, extents, inners, strict=True)]
    sources = [_divide(at + shift, whole)[1] for at, shift, whole in zip(rolled, shift_size, wholes, strict=True)]
    outside = torch.stack([at >= length for at, length in zip(sources, spatial, strict=True)])
    nowhere = outside.any(0)
    if extent is not None:
        beyond = torch.stack([at >= side for at, side in zip(inners, extent, strict=True)]).any(0)
        nowhere = nowhere | beyond
    token = torch.where(nowhere, places, _join(sources, spatial))

    rows = qkv.reshape(batch, places * 3 * num_heads, channels // 3 // num_heads)
    padding = rows.new_zeros(batch, 3 * num_heads, rows.shape[-1])
    rows = torch.cat(
        [rows, padding if pad_value is None else padding + pad_value.to(rows.dtype).view(padding.shape[1:])], 1
    )
    query = (token * (3 * num_heads) + of_head[:, None]).flatten()
    rows = rows.index_select(1, torch.cat([query, query + num_heads, query + 2 * num_heads]))
    q, k, v = rows.reshape(batch, 3, sequences, tokens, rows.shape[-1]).unbind(1)

    wide = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is not None:
        q, k = cosine(q, k, logit_scale.to(wide).flatten().index_select(0, of_head)[:, None, None])
        scale = 1.0
    if extent is not None:
        hidden = torch.zeros(tokens, dtype=wide, device=device).masked_fill(beyond, -math.inf)  # the first never is
        bias = hidden.expand(num_heads, tokens, tokens) if bias is None else bias + hidden
    mask = None if bias is None else bias.index_select(0, of_head)
    if not all(surely(shift == 0) for shift in shift_size):
        edges = [at >= whole - shift for at, whole, shift in zip(rolled, wholes, shift_size, strict=True)]
        side = sum(edge.long() * 2**axis for axis, edge in enumerate(edges))
        other = (side[:, :, None] != side[:, None]).to(wide) * SHIFT_MASK
        mask = other if mask is None else mask + other
    if mask_padding:
        hidden = outside.any(0) & outside.flatten(1).any(1).all()
        hidden = hidden[:, None].to(wide) * PADDING_MASK
        mask = hidden.expand(sequences, tokens, tokens) if mask is None else mask + hidden
    x = attend(q, k, v, attn_mask=None if mask is None else mask[None], dropout_p=dropout_p, scale=scale)

    # of each head of each token of the map: where it was attended; padding comes after all of them, and is left out
    heads = (token * num_heads + of_head[:, None]).flatten()
    found = torch.arange(sequences * tokens, device=device)
    found = found.new_zeros((places + 1) * num_heads).scatter(0, heads, found)[: places * num_heads]
    return x.flatten(1, 2).index_select(1, found).reshape(batch, *spatial, channels // 3)
