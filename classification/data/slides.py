"""timm's shears and translations in less than half of Pillow's time for them: each row or column moves by itself."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor


class Slidable:
    """What an operation of timm takes for a picture, which asks of it its size and a `transform`."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture, self.size = picture, picture.size

    def transform(self, size: tuple[int, int], method: Any, matrix: tuple[float, ...], **settings: Any) -> Image.Image:
        """Pillow's for the matrix of a shear or translation: within one grey level if bicubic and in colour."""
        if settings["resample"] != Image.Resampling.BICUBIC or self.picture.mode != "RGB":
            return self.picture.transform(size, method, matrix, **settings)
        _, shear_x, right, shear_y, _, down = matrix
        rows = shear_y == down == 0
        middles = torch.arange(size[1] if rows else size[0], dtype=torch.float64) + 0.5
        shifts = shear_x * middles + right if rows else shear_y * middles + down
        return _slide(self.picture, shifts, settings["fillcolor"], rows=rows)


@dataclass(frozen=True)
class Sliding:
    """An operation of timm that shears or translates, by `Slidable`."""

    operation: Any

    def __call__(self, picture: Image.Image, *args: Any, **settings: Any) -> Image.Image:
        return self.operation(Slidable(picture), *args, **settings)


def _slide(picture: Image.Image, shifts: Tensor, fill: tuple[int, ...], *, rows: bool) -> Image.Image:
    """Pixel x of each row, or column, becomes what is there at x + its shift, `fill` where that is outside."""
    data = bytearray(picture.convert("RGBX").tobytes())  # so that a pixel is one number
    pixels = torch.frombuffer(data, dtype=torch.int32).view(picture.height, picture.width)
    lines = pixels if rows else pixels.T.contiguous()
    length, whole = lines.shape[1], shifts.floor()
    places = torch.arange(-1, length + 2) + whole.long()[:, None]
    values = lines.gather(1, places.clamp(0, length - 1))[..., None].view(torch.uint8).float()
    weights = _weights((shifts - whole).float())[:, :, None, None]
    moved = values[:, :length] * weights[0]
    for tap in (1, 2, 3):
        moved.addcmul_(values[:, tap : tap + length], weights[tap])
    moved = moved.clamp_(0, 255).byte().view(torch.int32)[..., 0]
    seen = torch.arange(length) + (shifts + 0.5).floor().long()[:, None]  # the pixels that hold the places
    moved.masked_fill_((seen < 0) | (seen >= length), int.from_bytes(bytes([*fill, 0]), sys.byteorder))
    moved = moved if rows else moved.T.contiguous()
    return Image.frombuffer("RGBX", picture.size, moved.numpy(), "raw", "RGBX", 0, 1).convert("RGB")


def _weights(beyond: Tensor) -> Tensor:
    """Of the four pixels around places so far beyond the second, (4, number of places): Pillow's cubic, with a = -1."""
    near, far = torch.stack([beyond, 1 - beyond]), torch.stack([1 + beyond, 2 - beyond])
    near, far = (near - 2) * near * near + 1, ((5 - far) * far - 8) * far + 4
    return torch.stack([far[0], near[0], near[1], far[1]])
