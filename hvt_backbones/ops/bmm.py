"""Window attention through batched matrix products, for the CPU.

A window is a short sequence. `scaled_dot_product_attention` tiles it as if it were long, or scales, masks and checks
for empty rows in passes of their own; here the first product scales, and one pass adds bias and mask together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import WindowLayout, window_mask


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
    q, k, v = layout.split(qkv, pad_value)  # (B, windows, heads, N, head_dim) each
    wide = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is not None:
        q = (F.normalize(q.to(wide), dim=-1) * logit_scale.to(wide).view(num_heads, 1, 1)).to(v.dtype)
        k = F.normalize(k.to(wide), dim=-1).to(v.dtype)
        scale = 1.0
    if any(shift_size) or mask_padding:
        mask = window_mask(layout.spatial, window_size, shift_size, mask_padding, wide, qkv.device)[:, None]
        bias = mask if bias is None else bias + mask

    shape = (*q.shape[:-1], layout.tokens)
    q, k, v = (t.flatten(0, 2) for t in (q, k, v))
    unread = q.new_empty(1, 1, 1)  # beta = 0: the call is there for its factor alpha, which costs nothing
    logits = torch.baddbmm(unread, q, k.mT, beta=0, alpha=scale).to(wide)
    if bias is not None:
        logits.view(shape).add_(bias)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p)
    return layout.join(torch.bmm(weights.to(v.dtype), v))
