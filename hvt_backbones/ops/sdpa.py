"""Window attention through `scaled_dot_product_attention`: CPU, CUDA and Ascend."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .eager import device_kind, looked_into
from .windows import WindowGrid, cosine, every_mask


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, by the one of its kernels that can be looked into where something does."""
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype)
    if looked_into(q, k, v, attn_mask):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    if q.device.type == "cpu" and device_kind(q) == "cuda":
        return _memory_efficient(q, k, v, attn_mask, **options)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)


def _memory_efficient(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *, dropout_p: float, scale: float | None
) -> Tensor:
    """What `F.scaled_dot_product_attention` does on CUDA: its kernel that takes a bias and keeps no logits.

    The rows of a bias are padded to 16 numbers; its gradient is as large as the logits.
    """
    if attn_mask is not None:
        tokens = attn_mask.shape[-1]
        if tokens % 16:
            attn_mask = F.pad(attn_mask, (0, -tokens % 16))[..., :tokens]
        attn_mask = attn_mask.expand(*q.shape[:-1], tokens)
    kept = torch.is_grad_enabled() and q.requires_grad  # the logarithms of the sums, for backward
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(q, k, v, attn_mask, kept, dropout_p, False, scale=scale)[0]


def sdpa(
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
    grid = WindowGrid(qkv.shape, window_size, shift_size, num_heads)
    windows, tokens = grid.windows, grid.tokens
    qkv = grid.partition(qkv, pad_value)
    masked = any(shift_size) or mask_padding
    # with a mask that differs between windows, these count as heads: the mask then broadcasts over the batch uncopied
    q, k, v = qkv.flatten(2, 3) if masked else qkv.flatten(1, 2)

    wide = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is not None:
        heads = logit_scale.to(wide).view(num_heads, 1, 1)
        q, k = cosine(q, k, heads.repeat(windows, 1, 1) if masked else heads)
        scale = 1.0
    if masked:
        mask = every_mask(grid.spatial, window_size, shift_size, mask_padding, wide, qkv.device)[:, None]
        mask = mask.expand(windows, num_heads, tokens, tokens) if bias is None else bias + mask
        bias = mask.reshape(1, windows * num_heads, tokens, tokens)
    return grid.reverse(attend(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale))
