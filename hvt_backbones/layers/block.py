"""The residual block of all families."""

from __future__ import annotations

from torch import Tensor, nn

from .maps import convolve
from .mlp import DropPath


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
        self.drop_path = DropPath(drop_path)
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self.attn(x)))
            x = x + self.drop_path(self.norm2(self.mlp(x)))
        else:
            x = x + self.drop_path(self.attn(self.norm1(x)))
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.position is None else x + convolve(x, self.position)
