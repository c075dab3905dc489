"""Patch embedding and patch merging over channels-last maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..ops.windows import pad_map
from .maps import convolve, pad_to_cell


class PatchEmbed(nn.Module):
    """Non-overlapping patch embedding (Swin, arXiv:2103.14030, Sec. 3.1; Twins, arXiv:2104.13840, Sec. 3.1).

    Args:
        in_dim, dim: channels in and out.
        patch_size: (height, width), or (frames, height, width).
        norm_eps: eps of the LayerNorm after it; None for no norm.
        pad: zero-pad sizes that the patch does not divide (Swin's dense code), or drop the rest (Twins), but keep one
            patch of a map that is smaller than it.

    Shape: (B, [T,] H, W, in_dim) -> (B, [T',] H', W', dim).
    """

    def __init__(
        self, in_dim: int, dim: int, patch_size: Sequence[int], *, norm_eps: float | None = 1e-5, pad: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.pad = pad
        conv: Callable[..., nn.Module] = nn.Conv3d if len(self.patch_size) == 3 else nn.Conv2d
        self.proj = conv(in_dim, dim, self.patch_size, self.patch_size)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, self.patch_size) if self.pad else pad_to_cell(x, self.patch_size)
        return self.norm(convolve(x, self.proj))


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
        x = pad_map(x, size)
        *outer, height, width, channels = x.shape
        # `unflatten` and `flatten` become numbers of one size in ONNX's TorchScript exporter
        x = x.reshape(*outer, height // 2, 2, width // 2, 2, channels)
        *front, rows, row, columns, column, channel = range(x.dim())
        # column before row: the channel order of the released checkpoints
        x = x.permute(*front, rows, columns, column, row, channel)
        x = x.reshape(*outer, height // 2, width // 2, 4 * channels)
        return self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
