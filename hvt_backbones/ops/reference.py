"""Window attention in plain steps: the specification that every other implementation is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import crop_map, pad_map, window_mask, window_partition, window_reverse


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, scale: float, dropout_p: float
) -> Tensor:
    """Attention of sequences (..., N, head_dim) with `attn_mask` added to the logits, as `sdpa.attend`."""
    logits = (q * scale @ k.mT).to(torch.promote_types(q.dtype, torch.float32))
    if attn_mask is not None:
        logits = logits + attn_mask
    return F.dropout(logits.softmax(dim=-1), dropout_p).to(v.dtype) @ v


def reference(
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
    spatial, axes = qkv.shape[1:-1], len(window_size)
    map_axes = tuple(range(1, axes + 1))
    x = pad_map(qkv, window_size, pad_value)
    padded = x.shape[1:-1]
    x = torch.roll(x, [-shift for shift in shift_size], map_axes)

    grid = [length // side for length, side in zip(padded, window_size, strict=True)]
    x = window_partition(x, window_size).reshape(x.shape[0], math.prod(grid), math.prod(window_size), 3, num_heads, -1)
    q, k, v = x.permute(3, 0, 1, 4, 2, 5)  # (B, windows, heads, N, head_dim) each

    wide = torch.promote_types(qkv.dtype, torch.float32)
    if logit_scale is None:
        logits = (q * scale @ k.mT).to(wide)
    else:
        cosine = F.normalize(q.to(wide), dim=-1) @ F.normalize(k.to(wide), dim=-1).mT
        logits = cosine.to(wide) * logit_scale.to(wide).view(num_heads, 1, 1)
    if bias is not None:
        logits = logits + bias
    if any(shift_size) or mask_padding:
        logits = logits + window_mask(spatial, window_size, shift_size, mask_padding, wide, qkv.device)[:, None]
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)

    x = (weights.to(v.dtype) @ v).transpose(2, 3).flatten(3)  # (B, windows, N, C)
    x = window_reverse(x.reshape(x.shape[0], *grid, *window_size, -1), axes)
    return crop_map(torch.roll(x, shift_size, map_axes), spatial)
