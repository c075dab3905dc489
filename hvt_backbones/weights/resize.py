"""Weights for another size: position tables, absolute position embeddings, other input channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def square_window(rows: int) -> tuple[int, int] | None:
    """The square window whose position table has this many rows, (2 * side - 1) squared; None if there is none."""
    width = math.isqrt(rows)
    return ((width + 1) // 2,) * 2 if width % 2 and width * width == rows else None


def image_window(rows: int, like: Sequence[int]) -> tuple[int, int] | None:
    """The window whose position table has this many rows: of the shape of `like`, or square; None if there is none."""
    height, width = like
    for side in range(1, rows + 1):
        across, rest = divmod(side * width, height)
        if not rest and (2 * side - 1) * (2 * across - 1) >= rows:
            return (side, across) if (2 * side - 1) * (2 * across - 1) == rows else square_window(rows)
    return square_window(rows)


def video_window(rows: int, like: Sequence[int]) -> tuple[int, int, int] | None:
    """The window (frames, height, width) whose position table has this many rows, with `like`'s height and width."""
    _, height, width = like
    offsets, rest = divmod(rows, (2 * height - 1) * (2 * width - 1))
    return None if rest or offsets % 2 == 0 else ((offsets + 1) // 2, height, width)


def resize_position_table(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Resize a table of relative position biases to another window, bicubically per axis, as the official Swin code.

    A window of three axes is resized in time alone, linearly.

    Args:
        table: ((2 * old[0] - 1) * (2 * old[1] - 1), num_heads).
        old, new: windows, (height, width) or (frames, height, width).
    """
    image = table.float().T.unflatten(1, [2 * side - 1 for side in old])[None]
    size = [2 * side - 1 for side in new]
    if len(size) == 3:
        return F.interpolate(image.flatten(3), size=(size[0], image[0, 0, 0].numel()), mode="bilinear").flatten(2)[0].T
    return F.interpolate(image, size=size, mode="bicubic").flatten(2)[0].T


def resize_position_embedding(embedding: Tensor, size: Sequence[int]) -> Tensor:
    """Resize an absolute position embedding (1, H, W, C) to another grid, bicubically, as the official Swin code."""
    image = embedding.float().movedim(-1, 1)
    return F.interpolate(image, size=tuple(size), mode="bicubic").movedim(1, -1)


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Give the kernel (out, in, *size) of the first convolution another number of input channels.

    As timm's `adapt_input_conv`: one channel takes the sum; else the channels are repeated in turn and scaled, so that
    the response to an image whose channels are equal stays about the same.
    """
    given = weight.shape[1]
    weight = weight.float()
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(in_chans / given), *[1] * (weight.dim() - 2))
    return repeated[:, :in_chans] * (given / in_chans)
