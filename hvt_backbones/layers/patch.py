"""Patch embedding and patch merging over channels-last maps of two or three axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def pad_to_multiple(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zero-pad the end of each axis of a map (B, *spatial, C) to a multiple of `size`."""
    pads = [-length % multiple for length, multiple in zip(x.shape[1:-1], size, strict=True)]
    if not any(pads):
        return x
    return F.pad(x, (0, 0, *itertools.chain.from_iterable((0, pad) for pad in reversed(pads))))


def patches(x: Tensor, size: Sequence[int]) -> Tensor:
    """Cut a map into patches: (B, *spatial, C) -> (B, *grid, prod(size) * C); what does not fill a patch is dropped.

    Within a patch the axes keep their order and the channels come last.
    """
    axes = len(size)
    grid = [length // side for length, side in zip(x.shape[1:-1], size, strict=True)]
    for axis, (cells, side) in enumerate(zip(grid, size, strict=True)):
        x = x.narrow(axis + 1, 0, cells * side)
    split = itertools.chain.from_iterable(zip(grid, size, strict=True))
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    return x.permute(order).reshape(x.shape[0], *grid, math.prod(size) * x.shape[-1])


def project_patches(x: Tensor, conv: nn.Module) -> Tensor:
    """Apply a convolution whose stride is its kernel as one matrix product on a channels-last map.

    Faster than the convolution on every device tried, and the only way on those without a bf16 Conv3d.
    Shape: (B, *spatial, C) -> (B, *grid, E).
    """
    weight = conv.weight.movedim(1, -1).flatten(1)  # (E, C, *kernel) -> (E, prod(kernel) * C)
    return F.linear(patches(x, conv.kernel_size), weight, conv.bias)


CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


class PatchEmbed(nn.Module):
    """Non-overlapping patch embedding (Swin, arXiv:2103.14030, Sec. 3.1; Twins, arXiv:2104.13840, Sec. 3.1).

    Args:
        in_dim, dim: channels in and out.
        patch_size: one side per axis.
        norm_eps: eps of the LayerNorm after it; None for no norm.
        pad: zero-pad sizes that the patch does not divide (Swin's dense code), or drop the rest (Twins).

    Shape: (B, *spatial, in_dim) -> (B, *grid, dim).
    """

    def __init__(
        self, in_dim: int, dim: int, patch_size: Sequence[int], *, norm_eps: float | None = 1e-5, pad: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.pad = pad
        self.proj = CONVS[len(self.patch_size)](in_dim, dim, self.patch_size, self.patch_size)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = pad_to_multiple(x, self.patch_size)
        return self.norm(project_patches(x, self.proj))


class PatchMerging(nn.Module):
    """Halve the resolution and double the channels (Swin, arXiv:2103.14030, Sec. 3.1).

    SwinV2 (arXiv:2111.09883, Sec. 3.2) norms after the reduction instead of before. Time is never merged.

    Shape: (B, [T,] H, W, C) -> (B, [T,] ceil(H / 2), ceil(W / 2), 2C); odd sides are zero-padded.
    """

    def __init__(self, dim: int, *, post_norm: bool = False, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm = nn.LayerNorm(2 * dim if post_norm else 4 * dim, eps=norm_eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = (*[1] * (x.dim() - 4), 2, 2)
        x = pad_to_multiple(x, size)
        x = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # (..., H/2, 2, W/2, 2, C)
        # column before row: the channel order of the released checkpoints
        x = x.movedim((-2, -4), (-3, -2)).flatten(-3)  # (..., H/2, W/2, 4C)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
