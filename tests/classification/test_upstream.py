"""What timm and Pillow do to pictures, with the installed versions: every operation, every recipe, no warnings."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment

from classification.command_line import load_recipe
from classification.config import AugmentationConfig, DataConfig
from classification.data import patches
from classification.data.loading import augmentations, random_crop
from classification.data.pictures import seed_generators

RECIPES = Path("classification/recipes")
DRAWS = 3000  # pictures per pipeline: what is asked for once in some hundreds comes up


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def pipelines() -> dict[tuple, str]:
    """The distinct augmentations of the recipes -> one recipe that has it."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        settings = load_recipe(path)
        ours = {key: value for key, value in settings.items() if key.startswith("augmentation.")}
        found.setdefault(repr(sorted(ours.items())), path.stem)
    return found


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(40, 32), (1, 1), (1, 9)], ids=str)
def test_every_operation_at_every_magnitude(mode: str, size: tuple[int, int]) -> None:
    picture = noise(mode, size)
    settings = {"translate_const": 10, "img_mean": (124, 116, 104)[: len(mode)], "interpolation": Image.BICUBIC}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in auto_augment.NAME_TO_OP:
            for limit in (None, 30):  # mmax goes beyond 10
                for magnitude in np.linspace(0, limit or 10, 11).tolist():
                    operation = auto_augment.AugmentOp(name, 1.0, magnitude, {**settings, "magnitude_max": limit})
                    changed = operation(picture.copy())
                    assert (changed.size, changed.mode) == (size, mode), (name, magnitude)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_no_bits_are_black(mode: str) -> None:
    picture = noise(mode, (8, 8))
    for bits in (0, -3):
        assert not np.asarray(patches.posterize(picture, bits)).any()
    for bits in range(1, 8):
        assert patches.posterize(picture, bits).tobytes() == ImageOps.posterize(picture, bits).tobytes()


@pytest.mark.parametrize("recipe", pipelines().values())
def test_every_pipeline_of_the_recipes(recipe: str) -> None:
    chosen = load_recipe(RECIPES / f"{recipe}.yaml")
    ours = {
        key.partition(".")[2]: tuple(value) if isinstance(value, list) else value
        for key, value in chosen.items()
        if key.startswith("augmentation.")
    }
    settings = DataConfig(input_size=(3, 32, 32)), AugmentationConfig(**ours)
    crop, transform = random_crop(*settings), augmentations(*settings)
    sizes = [(40, 32), (1, 1), (3, 50)]
    for seed in range(DRAWS):
        seed_generators(seed)
        picture = noise("RGB", sizes[seed % len(sizes)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = transform(crop.resize(picture, crop.draw(picture)))
        assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)


def test_pictures_with_harmless_faults_say_nothing() -> None:
    palette = io.BytesIO()
    Image.new("P", (4, 4)).save(palette, "png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patches.silence_false_alarms()
        with Image.open(palette) as picture:
            picture.convert("RGB")
        exif = Image.Exif()
        exif.load(b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01\x03\x00")
        dict(exif)
