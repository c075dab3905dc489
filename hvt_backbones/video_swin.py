"""Video Swin (arXiv:2106.13230): Swin over time, height and width; here is only what the third axis adds."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backbone import check_stages, sides
from .layers.position_bias import RelativePositionBias, relative_position_index
from .swin import CosineWindowAttention, ShiftedWindowBackbone, Window, WindowAttention, windows_per_stage


class CornerPositionBias(RelativePositionBias):
    """A learned table whose smaller windows of N tokens take the biases of the first N tokens of the whole window.

    The official code does so: along an axis that shrinks other than the first, these are not the same offsets.
    """

    def _index(self, window: tuple[int, ...], device: torch.device) -> Tensor:
        whole, tokens = math.prod(self.window_size), math.prod(window)
        index = relative_position_index(self.window_size, self.window_size, device)
        return index.view(whole, whole)[:tokens, :tokens].flatten()


class FitsEachAxis:
    """Along each axis on which the map is not larger than the window, the window shrinks to it and is not shifted."""

    def fit_window(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        fits = [n > side for n, side in zip(spatial, self.window_size, strict=True)]
        window = tuple(side if fit else n for n, side, fit in zip(spatial, self.window_size, fits, strict=True))
        return window, tuple(shift if fit else 0 for shift, fit in zip(self.shift_size, fits, strict=True))


class VideoWindowAttention(FitsEachAxis, WindowAttention):
    """Attention in (shifted) windows over three axes (Video Swin, arXiv:2106.13230, Sec. 3.2).

    Shape: (B, T, H, W, C) -> (B, T, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, window_size: tuple[int, ...], **options: Any) -> None:
        super().__init__(dim, num_heads, window_size, small_map="shrink", **options)
        self.position_bias = CornerPositionBias(window_size, num_heads)


class CosineVideoWindowAttention(FitsEachAxis, CosineWindowAttention):
    """The same with SwinV2's logits and biases."""


class VideoSwinTransformer(ShiftedWindowBackbone):
    """Video Swin Transformer (arXiv:2106.13230): clips (B, C, T, H, W) of any length and size.

    Time is cut into tubes once, by the patch embedding, and merged no further. A length or a side that the patches do
    not divide is zero-padded; one frame alone is a clip too.

    Args:
        patch_size: (frames, height, width) of a tube, or one side for all three.
        window_size: (frames, height, width) of a window in tokens, or one of these per stage. Where a map is not
            larger along an axis, the window shrinks to it there.
        out_indices: the stages whose normed maps (B, C_i, T_i, H_i, W_i) are returned; later stages are not built.

    The other arguments, and the errors, are those of `SwinTransformer`, which has the same blocks.
    """

    family = "video_swin"
    axes = 3

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch_size: int | Sequence[int] = (2, 4, 4),
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Window | Sequence[Window] = (8, 7, 7),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        check_stages(out_indices, depths=depths, num_heads=num_heads)
        super().__init__(
            [functools.partial(VideoWindowAttention, qk_scale=qk_scale)] * len(depths),
            post_norm=False,
            in_chans=in_chans,
            patch_size=sides(patch_size, 3, "patch_size"),
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            windows=windows_per_stage(window_size, len(depths), 3),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            ape_size=None,
            patch_norm=patch_norm,
            output_norm=output_norm,
            norm_eps=norm_eps,
            out_indices=out_indices,
        )


class VideoSwinTransformerV2(ShiftedWindowBackbone):
    """Experimental: SwinV2's blocks (arXiv:2111.09883) over three axes. Nobody published such a model or its weights.

    Args:
        pretrained_window_size: the window the weights were trained with, given like `window_size`; 0 for this one.

    The other arguments, and the errors, are those of `VideoSwinTransformer`.
    """

    family = "video_swinv2"
    axes = 3

    def __init__(
        self,
        *,
        in_chans: int = 3,
        patch_size: int | Sequence[int] = (2, 4, 4),
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Window | Sequence[Window] = (8, 8, 8),
        pretrained_window_size: Window | Sequence[Window] = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        check_stages(out_indices, depths=depths, num_heads=num_heads)
        pretrained = windows_per_stage(pretrained_window_size, len(depths), 3, name="pretrained_window_size", least=0)
        super().__init__(
            [
                functools.partial(CosineVideoWindowAttention, pretrained_window_size=window, small_map="shrink")
                for window in pretrained
            ],
            post_norm=True,
            in_chans=in_chans,
            patch_size=sides(patch_size, 3, "patch_size"),
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            windows=windows_per_stage(window_size, len(depths), 3),
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            ape_size=None,
            patch_norm=patch_norm,
            output_norm=output_norm,
            norm_eps=norm_eps,
            out_indices=out_indices,
        )
