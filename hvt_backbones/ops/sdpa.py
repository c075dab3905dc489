"""Window attention through `scaled_dot_product_attention`: CPU, CUDA and Ascend."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import crop_map, join_windows, pad_map, split_windows, window_mask


def sdpa(
    qkv: Tensor, bias: Tensor | None, window_size: tuple[int, ...], shift_size: tuple[int, ...], num_heads: int, *,
    scale: float, logit_scale: Tensor | None, pad_value: Tensor | None, mask_padding: bool, dropout_p: float,
) -> Tensor:
    spatial, axes = qkv.shape[1:-1], len(window_size)
    map_axes = tuple(range(1, axes + 1))
    x = pad_map(qkv, window_size, pad_value)
    if any(shift_size):
        x = torch.roll(x, [-shift for shift in shift_size], map_axes)
    batch, padded = x.shape[0], x.shape[1:-1]
    grid = [length // side for length, side in zip(padded, window_size, strict=True)]
    windows, tokens = math.prod(grid), math.prod(window_size)
    masked = any(shift_size) or mask_padding

    # (3, B, *grid, heads, *window, head_dim) in one copy
    x = split_windows(x.unflatten(-1, (3, num_heads, -1)), window_size)
    first = 2 * axes + 1
    x = x.permute(first, 0, *range(1, axes + 1), first + 1, *range(axes + 1, first), first + 2)
    # with a mask that differs between windows, these count as heads: the mask then broadcasts over the batch uncopied
    shape = (3, batch, windows * num_heads, tokens, -1) if masked else (3, batch * windows, num_heads, tokens, -1)
    q, k, v = x.reshape(shape)

    if logit_scale is not None:
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = logit_scale.to(wide).view(num_heads, 1, 1)
        q = (F.normalize(q.to(wide), dim=-1) * (heads.repeat(windows, 1, 1) if masked else heads)).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        scale = 1.0
    if masked:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        mask = window_mask(spatial, window_size, shift_size, mask_padding, wide, qkv.device)
        mask = mask[:, None] if bias is None else bias + mask[:, None]
        bias = mask.expand(windows, num_heads, tokens, tokens).reshape(1, windows * num_heads, tokens, tokens)
    if bias is not None:
        bias = bias.to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)

    x = x.reshape(batch, *grid, num_heads, *window_size, -1)
    x = x.movedim(axes + 1, -2).flatten(-2)
    x = join_windows(x, axes)
    if any(shift_size):
        x = torch.roll(x, shift_size, map_axes)
    return crop_map(x, spatial)
