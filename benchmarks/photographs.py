"""Drawn pictures that cost a JPEG decoder what photographs do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEAVES = 400
QUALITY = 90  # about that of cameras and of ImageNet's pictures


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> None:
    """`folder/train/one/*.jpg` and `folder/val/one/*.jpg`, `count` of each, unless the folder is there."""
    if folder.exists():
        return
    for seed, split in enumerate(("train", "val")):
        place = folder / split / "one"
        place.mkdir(parents=True)
        for number in range(count):
            draw(np.random.default_rng([seed, number]), *size).save(place / f"{number:03}.jpg", quality=QUALITY)


def draw(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Dead leaves (Lee, Mumford and Huang, 2001): discs of any size that hide one another, with the edges and the
    spectrum of natural scenes, each with a texture of its own; light that changes slowly; a sensor's noise.
    """
    textures = [_cloud(generator, height, width, 1.2) for _ in range(3)]
    light = _cloud(generator, height, width, 2.0)
    scene = np.full((height, width, 3), generator.uniform(40, 220, 3))
    for _ in range(LEAVES):
        radius = 0.02 * min(height, width) / generator.uniform(0.04, 1)
        middle, turn, flat = (
            generator.uniform(0, (height, width)),
            generator.uniform(0, np.pi),
            generator.uniform(0.4, 1),
        )
        top, left = np.maximum(middle - radius, 0).astype(int)
        bottom, right = (middle + radius + 1).astype(int)
        part = np.s_[top:bottom, left:right]
        rows, columns = np.indices(scene[part].shape[:2])
        down, along = rows + top - middle[0], columns + left - middle[1]
        distance = np.hypot(
            along * np.cos(turn) + down * np.sin(turn), (down * np.cos(turn) - along * np.sin(turn)) / flat
        )
        inside = np.clip(radius - distance, 0, 1)[..., None]
        texture = generator.uniform(3, 25) * textures[generator.integers(3)][part]
        scene[part] += inside * (generator.uniform(20, 235, 3) + texture[..., None] - scene[part])
    scene += 12 * light[..., None] + 2 * generator.standard_normal((height, width, 1))
    return Image.fromarray(scene.clip(0, 255).astype(np.uint8))


def _cloud(generator: np.random.Generator, height: int, width: int, power: float) -> NDArray[np.float64]:
    """Noise whose amplitudes fall with the frequency to this power, of standard deviation 1."""
    down, along = np.fft.fftfreq(height) * height, np.fft.rfftfreq(width) * width
    frequency = np.maximum(np.hypot(down[:, None], along), 1)
    spectrum = generator.standard_normal((2, *frequency.shape)) / frequency**power
    spectrum[:, 0, 0] = 0
    cloud = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], (height, width))
    return cloud / cloud.std()
