"""Video Swin (arXiv:2106.13230): Swin over time, height and width; here is only what the third axis adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layers.window_attention import RelativePositionBias, WindowAttention, mixed_radix, pairs, token_places
from .ops.eager import constant
from .swin import ShiftedWindowBackbone, Window


@constant()
def corner_places(
    whole: tuple[int, ...], window: tuple[int, ...], extent: tuple[int, ...], device: torch.device
) -> Tensor:
    """`token_places` in a table for windows of `whole`, for each token of `window` that of the token of its number.

    Tokens of `window` beyond `extent` have no number of their own, and the place of some other.
    """
    number = mixed_radix(window, extent, device).clamp(max=math.prod(whole) - 1)
    return token_places(whole, whole, device).index_select(0, number)


@constant()
def corner_index(
    whole: tuple[int, ...], window: tuple[int, ...], extent: tuple[int, ...], device: torch.device
) -> Tensor:
    """Row of that table for each pair of tokens of `window`: (N * N,), int64."""
    return pairs(corner_places(whole, window, extent, device), whole)


class CornerPositionBias(RelativePositionBias):
    """A learned table whose smaller windows of N tokens take the biases of the first N tokens of the whole window.

    The official code does so: along an axis that shrinks other than the first, these are not the same offsets.
    """

    def _places(self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device) -> Tensor:
        return corner_places(self.window_size, window, extent, device)

    def _index(self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device) -> Tensor:
        return corner_index(self.window_size, window, extent, device)


class VideoWindowAttention(WindowAttention):
    """Attention in (shifted) windows over three axes (Video Swin, arXiv:2106.13230, Sec. 3.2).

    Along each axis on which the map is not larger than the window, the window shrinks to it and is not shifted.

    Shape: (B, T, H, W, C) -> (B, T, H, W, C).
    """

    def __init__(self, dim: int, num_heads: int, window_size: tuple[int, ...], **options: Any) -> None:
        super().__init__(dim, num_heads, window_size, small_map="shrink", **options)
        self.each_axis = True
        self.position_bias = CornerPositionBias(window_size, num_heads)


class VideoSwinTransformer(ShiftedWindowBackbone):
    """Video Swin Transformer (arXiv:2106.13230): clips (B, C, T, H, W) of any length and size.

    Time is cut into tubes once, by the patch embedding, and merged no further. A length or a side that the patches do
    not divide is zero-padded; one frame alone is a clip too.

    Args:
        patch_size: (frames, height, width) of a tube, or one side for all three.
        window_size: (frames, height, width) of a window in tokens, or one of these per stage. Where a map is not
            larger along an axis, the window shrinks to it there.
        out_indices: the stages whose normed maps (B, C_i, T_i, H_i, W_i) are returned; later stages are not built.

    The other arguments, and the errors, are those of `SwinTransformer`, but for `ape_size` and `small_map`.
    """

    family = "video_swin"
    axes = 3
    attention = VideoWindowAttention

    @classmethod
    def attention_options(  # type: ignore[override] # each class takes its own
        cls, stages: int, *, qk_scale: float | None = None
    ) -> list[dict[str, Any]]:
        return [{"qk_scale": qk_scale}] * stages

    def __init__(
        self,
        *,
        patch_size: int | Sequence[int] = (2, 4, 4),
        window_size: Window | Sequence[Window] = (8, 7, 7),
        **arguments: Any,
    ) -> None:
        super().__init__(patch_size=patch_size, window_size=window_size, **arguments)
