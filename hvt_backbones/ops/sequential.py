"""Attention part by part, so that only the logits of one part are alive: in forward, and made again in backward.

The sequential self-attention of SwinV2 (arXiv:2111.09883, Sec. 3.5), over windows or a whole map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .windows import WindowGrid, cosine, token_regions, windows_mask

FEWEST = 64  # queries of a part before windows are cut: fewer make thin products, and add up gradients of keys for each
Where = tuple[slice, slice, slice]  # windows, heads and queries of a part


@dataclass(frozen=True)
class BiasTable:
    """A bias (num_heads, N, N) of pairs of tokens by their offset, made where it is needed: `bias[heads, queries]`.

    Attributes:
        table: (offsets, num_heads), the offset of a token to itself in the middle.
        places: (N,), int64: the row for two tokens is so far from the middle as their places are from each other.
    """

    table: Tensor
    places: Tensor

    def __getitem__(self, where: tuple[slice, slice]) -> Tensor:
        heads, queries = where
        rows = self.places[queries, None] - self.places + len(self.table) // 2
        part = self.table[:, heads].index_select(0, rows.flatten())
        return part.view(*rows.shape, -1).permute(2, 0, 1).contiguous()


def part_sizes(windows: int, heads: int, queries: int, keys: int, max_logits: int) -> tuple[int, int, int]:
    """Windows, heads and queries of a part of at most `max_logits` logits, but at least those of one query.

    Heads are cut first, then queries: windows that are attended together share their part of the position bias.
    """
    some_heads = min(heads, max(1, max_logits // (windows * queries * keys)))
    some = min(queries, max(FEWEST, max_logits // (windows * some_heads * keys)))
    some_windows = min(windows, max(1, max_logits // (some_heads * some * keys)))
    return some_windows, some_heads, min(some, max(1, max_logits // (some_windows * some_heads * keys)))


def sequential(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_logits: int,
    bias: Callable[[Where], Tensor | None] = lambda _: None,
    *,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention of (windows, heads, N, head_dim) sequences in parts; gradients are exact, with dropout too.

    No tensor of logits, weights, bias, mask or their gradients has more numbers than `max_logits`, or than the keys of
    one query; six of that size are alive at a time at most. Beside them are the queries, keys, values and result.

    Args:
        attend: as `F.scaled_dot_product_attention`, with `attn_mask`, `scale` and `dropout_p`.
        q, k, v: there may be fewer or more keys than queries.
        bias: what is added to the logits of a part, (windows or 1, heads, queries, keys), or None.
    """
    if q[..., 0].numel() * k.shape[2] <= max_logits:
        return attend(q, k, v, attn_mask=bias((slice(None),) * 3), scale=scale, dropout_p=dropout_p)
    windows, heads, queries = part_sizes(q.shape[0], q.shape[1], q.shape[2], k.shape[2], max_logits)

    def attend_part(q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor:
        return attend(q, k, v, attn_mask=bias(where), scale=scale, dropout_p=dropout_p)

    part: Callable[..., Tensor] = attend_part
    if torch.is_grad_enabled():
        part = partial(checkpoint, attend_part, use_reentrant=False, preserve_rng_state=dropout_p > 0)
    # Tensors are split, not sliced: the gradient of a slice would be as large as the whole, one for each part.
    by_heads = []
    for i, of_heads in enumerate(zip(*(x.split(heads, 1) for x in (q, k, v)), strict=True)):
        every_k, every_v = (x.split(windows) for x in of_heads[1:])
        by_queries = []
        for j, every_q in enumerate(of_heads[0].split(queries, 2)):
            by_windows = [
                part(*qkv, (_piece(n, windows), _piece(i, heads), _piece(j, queries)))
                for n, qkv in enumerate(zip(every_q.split(windows), every_k, every_v, strict=True))
            ]
            by_queries.append(torch.cat(by_windows))
        by_heads.append(torch.cat(by_queries, 2))
    return torch.cat(by_heads, 1)


def _piece(number: int, length: int) -> slice:
    return slice(number * length, (number + 1) * length)


def sequential_windows(
    attend: Callable[..., Tensor],
    max_logits: int,
    qkv: Tensor,
    bias: Tensor | BiasTable | None,
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
    """`window_attention` by `sequential`."""
    grid = WindowGrid(qkv.shape, window_size, shift_size, num_heads)
    q, k, v = grid.partition(qkv, pad_value).flatten(1, 2)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if logit_scale is not None:
        q, k = cosine(q, k, logit_scale.to(wide).view(num_heads, 1, 1))
        scale = 1.0
    masked = any(shift_size) or mask_padding
    if masked:
        regions = token_regions(grid.spatial, window_size, shift_size, qkv.device)
        wrapped, padding = (tokens.repeat(grid.batch, 1) for tokens in regions)

    def added(where: Where) -> Tensor | None:
        windows, heads, queries = where
        added = None if bias is None else bias[heads, queries][None]
        if masked:
            mask = windows_mask(wrapped[windows], padding[windows] if mask_padding else None, wide, queries)[:, None]
            added = mask if added is None else added + mask
        return added

    return grid.reverse(sequential(attend, q, k, v, max_logits, added, scale=scale, dropout_p=dropout_p))
