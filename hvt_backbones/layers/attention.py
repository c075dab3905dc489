"""Attention over a reduced map, and what else PVTv2 and Twins share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.eager import symbolic
from ..ops.sdpa import attend
from ..ops.sequential import sequential
from .maps import channels_first, channels_last, convolve, pad_to_cell


def depthwise_conv(dim: int) -> nn.Conv2d:
    """3x3 convolution of each channel alone, which also tells a token where it is."""
    return nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a map (B, H, W, C) to (B, *size, C) cells."""
    if not (torch.jit.is_tracing() or symbolic(x)):
        return channels_last(F.adaptive_avg_pool2d(channels_first(x), size))
    # ONNX's exporters know only cells that divide the map: the same cells as matrices of shares
    rows, columns = (_shares(x.shape[axis], cells, x) for axis, cells in enumerate(size, start=1))
    return columns @ (rows @ x.flatten(2)).view(-1, *rows.shape[:1], *x.shape[2:])


def _shares(length: int, cells: int, x: Tensor) -> Tensor:
    """What each place along an axis of `x` gives to the mean of each cell: (cells, length)."""
    cell, place = (torch.arange(n, device=x.device) for n in (cells, length))
    starts, ends = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = (place >= starts[:, None]) & (place < ends[:, None])
    return inside.to(x.dtype) / (ends - starts)[:, None].to(x.dtype)


class SpatialReductionAttention(nn.Module):
    """Every token attends to a reduced map (PVT, arXiv:2102.12122, Sec. 3.3; Twins, arXiv:2104.13840, Sec. 3.2).

    The softmax is taken in float32 or wider under autocast too: `scaled_dot_product_attention` sees to it.

    Args:
        dim, num_heads: channels and heads.
        sr_ratio: side of the square of tokens that becomes one key and value, by a convolution; 1 for no reduction.
            Rows and columns that fill no square are dropped; a map shorter than one square is zero-padded to it.
        linear: PVTv2's linear attention (arXiv:2106.13797, Sec. 3.2): the map is averaged to 7x7 cells whatever its
            size, and `sr_ratio` does not count.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor on the logits instead of `head_dim ** -0.5`.
        norm_eps: eps of the norm of the reduced map.
        attn_drop_rate, drop_rate: dropout of the attention weights and of the result.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    POOLED_SIZE = (7, 7)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int,
        linear: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        norm_eps: float = 1e-5,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if sr_ratio < 1:
            raise InputError(f"sr_ratio {sr_ratio}: give 1 (no reduction) or more")
        self.num_heads = num_heads
        self.linear = linear
        self.sr_ratio = sr_ratio
        self.qk_scale = qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.max_logits: int | None = None  # by `Backbone.set_sequential_attention`
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)
        self.sr: nn.Conv2d | None = None
        if linear or sr_ratio > 1:
            side = 1 if linear else sr_ratio
            self.sr = nn.Conv2d(dim, dim, side, side)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)
            self.act = nn.GELU() if linear else nn.Identity()

    def reduce(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, h, w, C), the map of keys and values."""
        if self.sr is None:
            return x
        if self.linear:
            x = pool(x, self.POOLED_SIZE)
        else:
            x = pad_to_cell(x, (self.sr_ratio, self.sr_ratio))
        return self.act(self.norm(convolve(x, self.sr)))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(self.reduce(x)).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)  # (B, heads, h * w, head_dim) each
        dropout_p = self.attn_drop_rate if self.training else 0.0
        if self.max_logits is None:
            attended = attend(q, k, v, dropout_p=dropout_p, scale=self.qk_scale)
        else:
            attended = sequential(attend, q, k, v, self.max_logits, dropout_p=dropout_p, scale=self.qk_scale)
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(x.shape)))


def init_weights(module: nn.Module) -> None:
    """Starting values of the official PVTv2 and Twins; for `nn.Module.apply`. Norms keep PyTorch's ones and zeros."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
