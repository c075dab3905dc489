"""The random crop of training, from a file to a resized picture, without decoding more than it needs."""

from __future__ import annotations

import math
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor

from hvt_backbones.images import decode

PARTS = (8, 4, 2)  # of each side, at which a JPEG can be decoded
# a crop is decoded at the smallest part at which it has as many pixels as are asked for; from photographs of 2000x1500
# to 224x224, that is 0.6 grey levels from the whole picture's, where bilinear in place of bicubic is 0.8
Box = tuple[float, float, float, float]  # left, top, right, bottom


class RandomCrop:
    """A crop of random area and proportions, resized (timm's `RandomResizedCropAndInterpolation`), from a file.

    It is drawn as timm draws it, from Python's generator and the picture's size alone, before any pixel is decoded; a
    JPEG is then decoded at a half, a quarter or an eighth where that has pixels enough. The same crop of the whole
    picture is timm's within one grey level, but for some values in a million beside black and white.

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
        if box is None:
            box = self.draw(picture)
        return self.resize(picture, (box[0] / part, box[1] / part, box[2] / part, box[3] / part))

    def part(self, box: Box) -> int:
        """How many times as long the sides of the box may be as those of its pixels that are decoded."""
        height, width = self.size
        return next((n for n in PARTS if box[2] - box[0] >= n * width and box[3] - box[1] >= n * height), 1)

    def resize(self, picture: Image.Image, box: Box) -> Image.Image:
        """What lies in the box, and nothing around it, in the size that is asked for."""
        left, top = math.floor(box[0]), math.floor(box[1])
        crop = picture.crop((left, top, math.ceil(box[2]), math.ceil(box[3])))
        if crop.size == (box[2] - box[0], box[3] - box[1]):
            return self._resize_whole(crop)
        inner = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return crop.resize(self.size[::-1], str_to_pil_interp(self.interpolation), box=inner)

    def _resize_whole(self, crop: Image.Image) -> Image.Image:
        """By torch, which takes a third of Pillow's time for the same arithmetic, but has no fractions of a pixel."""
        pixels = torch.from_numpy(np.array(crop).reshape(1, crop.height, crop.width, -1)).permute(0, 3, 1, 2)
        resized: Tensor
        if self.interpolation == "nearest":
            resized = F.interpolate(pixels, self.size, mode="nearest-exact")
        else:
            resized = F.interpolate(pixels, self.size, mode=self.interpolation, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).squeeze(2).numpy())
