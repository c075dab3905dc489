"""The random crop of training, from a file to a resized picture, without decoding more than it needs."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from hvt_backbones.images import decode

PARTS = (8, 4, 2)  # of each side, at which a JPEG can be decoded
Box = tuple[int, int, int, int]  # left, top, right, bottom


class RandomCrop:
    """A crop of random area and proportions, resized (timm's `RandomResizedCropAndInterpolation`), from a file.

    It is drawn as timm draws it, from Python's generator and the picture's size alone, before any pixel is decoded. A
    JPEG is then decoded at the smallest part at which the crop has as many pixels as are asked for, and the crop's
    edges are on whole pixels of that: half of one from where they were drawn, at most. What comes out of a picture that
    is decoded whole is what Pillow makes of the same box, rows before columns, within one grey level (Pillow 13 takes
    some pictures' columns first, and differs there itself); of 2000x1500 at a part, 0.6 levels from it in the mean,
    where bilinear in place of bicubic is 0.8.

    Args:
        size: height and width of what comes out.
        scale: area of the crop over the picture's, from and to.
        ratio: width over height, from and to.
        interpolation: "bicubic", "bilinear" or "nearest".
    """

    def __init__(
        self, size: tuple[int, int], scale: tuple[float, ...], ratio: tuple[float, ...], interpolation: str
    ) -> None:
        self.size, self.scale, self.ratio = size, scale, ratio
        self.interpolation = interpolation

    def draw(self, picture: Image.Image) -> Box:
        """A box in a picture, whose pixels are not looked at."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(picture, self.scale, self.ratio)
        left, top = min(left, picture.width - 1), min(top, picture.height - 1)  # of a pixel or two timm draws nothing
        return left, top, left + max(width, 1), top + max(height, 1)

    def read(self, file: BinaryIO, channels: int) -> Image.Image:
        """The resized crop of the picture in a file.

        Raises:
            Exception: as `hvt_backbones.images.decode`.
        """
        box, part = None, 1

        def choose(picture: Image.Image) -> int:
            nonlocal box, part
            box = self.draw(picture)
            part = self.part(box)
            return part

        picture = decode(file, channels, part=choose)
        left, top, right, bottom = self.draw(picture) if box is None else (round(edge / part) for edge in box)
        return self.resize(picture, (left, top, right, bottom))

    def part(self, box: Box) -> int:
        """How many times as long the sides of the box may be as those of its pixels that are decoded."""
        height, width = self.size
        return next((n for n in PARTS if box[2] - box[0] >= n * width and box[3] - box[1] >= n * height), 1)

    def resize(self, picture: Image.Image, box: Box) -> Image.Image:
        """What lies in the box, and nothing around it, in the size that is asked for.

        By torch, which takes a third of Pillow's time for the same arithmetic.
        """
        crop = picture.crop(box)
        if self.interpolation == "nearest":
            return crop.resize(self.size[::-1], Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(crop).reshape(1, crop.height, crop.width, -1)).permute(0, 3, 1, 2)
        resized = F.interpolate(pixels, self.size, mode=self.interpolation, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).squeeze(2).numpy())
