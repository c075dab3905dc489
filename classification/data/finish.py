"""What is left to do where a batch of bytes has come to: normalised, and erased at random."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

OF_ERASING = 0xE5A5ED  # the picture's own draws begin with its seed itself
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of the rectangle: of the picture's area, and height over width


@dataclass(frozen=True)
class Finish:
    """Bytes to float32: scaled to 0..1, normalised, and erased in rectangles (arXiv:1708.04896) as timm does.

    The rectangle and its noise follow from the picture's seed, on a device of one kind, whatever else is in the batch.

    Args:
        mean, std: of the channels.
        erasing: probability that a picture is erased in a rectangle.
        mode: what is put there: "const" (zeros), "rand" (one normal number per channel) or "pixel" (one per value).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    erasing: float = 0.0
    mode: str = "pixel"

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """(B, C, H, W) uint8 -> float32, on the same device."""
        # the arithmetic of ToTensor and Normalize, to the bit
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        images.sub_(_of_channels(self.mean, images.device)).div_(_of_channels(self.std, images.device))
        if self.erasing > 0:
            generator = _generator(images.device)
            for image, seed in zip(images, seeds, strict=True):
                self._erase(image, seed, generator)
        return images

    def _erase(self, image: Tensor, seed: int, generator: torch.Generator) -> None:
        channels, height, width = image.shape
        box = self.rectangle(seed, height, width)
        if box is None:
            return
        top, left, tall, wide = box
        inside = image[:, top : top + tall, left : left + wide]
        if self.mode == "const":
            inside.zero_()
            return
        generator.manual_seed(seed ^ OF_ERASING)
        shape = (channels, tall, wide) if self.mode == "pixel" else (channels, 1, 1)
        inside.copy_(torch.randn(shape, generator=generator, device=generator.device).expand_as(inside))

    def rectangle(self, seed: int, height: int, width: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of what is erased of a picture; None where nothing is."""
        draws = random.Random(seed ^ OF_ERASING)
        if draws.random() > self.erasing:
            return None
        for _ in range(10):
            area = draws.uniform(*AREA) * height * width
            aspect = math.exp(draws.uniform(*map(math.log, ASPECT)))
            tall, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if tall < height and wide < width:
                return draws.randint(0, height - tall), draws.randint(0, width - wide), tall, wide
        return None


@lru_cache
def _of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), kept: to bring it to the device once more would wait for all that the device has yet to do."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _generator(device: torch.device) -> torch.Generator:
    """Of the device; the CPU's where it has none of its own."""
    try:
        return torch.Generator(device)
    except RuntimeError:
        return torch.Generator()
