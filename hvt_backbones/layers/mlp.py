"""The feed-forward part of a block, and stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError


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


def drop_path_rates(rate: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Stochastic-depth rate of each block, per stage: linear from 0 to `rate` over all blocks."""
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[rate * (start + j) / last for j in range(depth)] for start, depth in zip(starts, depths, strict=True)]
