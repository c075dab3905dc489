"""The residual block of all families: its feed-forward part, stochastic depth, and the block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .maps import convolve


def hidden_dim(dim: int, mlp_ratio: float) -> int:
    """Hidden units of a feed-forward part.

    Raises:
        InputError: there are none.
    """
    if int(dim * mlp_ratio) < 1:
        raise InputError(f"mlp_ratio {mlp_ratio!r} leaves no hidden unit for {dim} channels: give a larger one")
    return int(dim * mlp_ratio)


class Mlp(nn.Module):
    """Linear, GELU, linear. Shape: (..., C) -> (..., C)."""

    def __init__(self, dim: int, hidden: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drop a residual branch per sample, and scale the kept ones up.

    Shape: (B, ...) -> (B, ...).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep
        return x * (mask.to(x.dtype) / keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def recompute(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`part`, whose activations are computed once more in the backward pass instead of being kept."""
    return partial(checkpoint, part, use_reentrant=False)


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic-depth rate of each block, per stage: linear from 0 to `rate` over all blocks."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[rate * (start + j) / last for j in range(depth)] for start, depth in zip(starts, depths, strict=True)]


class Block(nn.Module):
    """Attention and MLP, each in a residual branch with a norm before it, or after it (SwinV2, Sec. 3.1).

    Args:
        dim: channels.
        attn, mlp: the two branches; each keeps the shape.
        norm_eps: eps of the norms.
        drop_path: rate of stochastic depth.
        post_norm: norm what a branch gives instead of what it takes.
        position: a convolution, the third branch at the end, without a norm: the position encoding of Twins.

    Shape: (B, *spatial, C) -> (B, *spatial, C).
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        *,
        norm_eps: float,
        drop_path: float,
        post_norm: bool = False,
        position: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.norm3: nn.Module | None = None  # of the sum of all branches: see `SwinTransformerV2`
        self.drop_path = DropPath(drop_path)
        self.position = position
        self.recomputed: str | None = None  # "attention" or "mlp", by `Backbone.set_grad_checkpointing`

    def _branch(self, branch: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        return recompute(branch) if self.training and self.recomputed == name else branch

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp = self._branch(self.attn, "attention"), self._branch(self.mlp, "mlp")
        if self.post_norm:
            x = x + self.drop_path(self.norm1(attn(x)))
            x = x + self.drop_path(self.norm2(mlp(x)))
        else:
            x = x + self.drop_path(attn(self.norm1(x)))
            x = x + self.drop_path(mlp(self.norm2(x)))
        if self.position is not None:
            x = x + convolve(x, self.position)
        return x if self.norm3 is None else self.norm3(x)
