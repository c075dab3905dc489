"""Drawn pictures in the layout of ADE20K: 8 of its 150 classes, label 0 where a pixel is of none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvt_backbones.atomic import whole_folder

from .shapes import GROUNDS, PICTURE_SIZES, Scene, draw_scene, scene_generator

# what is drawn -> number and name of its class in ADE20K's objectInfo150.txt
CLASSES = {
    "disc": (120, "ball"),
    "ring": (149, "clock"),
    "square": (42, "box"),
    "star": (67, "flower"),
    "triangle": (115, "tent"),
    "grass": (10, "grass"),
    "sand": (47, "sand"),
    "water": (22, "water"),
}


def write_ade(folder: Path, *, train: int, val: int, seed: int = 0) -> Path:
    """Write so many pictures as `folder/images/{training,validation}/*.jpg`, and their labels below `annotations`.

    Returns:
        `folder`; one that holds something is used as it is.

    Raises:
        InputError: it cannot be written.
    """
    with whole_folder(folder) as staging:
        if staging is None:
            return folder
        for split, short, count in (("training", "train", train), ("validation", "val", val)):
            images, annotations = staging / "images" / split, staging / "annotations" / split
            images.mkdir(parents=True)
            annotations.mkdir(parents=True)
            for number in range(1, count + 1):
                rng = scene_generator(seed, split, number)
                height, width = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
                scene = draw_scene(rng, height, width, shapes=int(rng.integers(2, 7)), crowd=number % 10 == 0)
                name = f"ADE_{short}_{number:08d}"
                Image.fromarray(scene.picture).save(images / f"{name}.jpg", quality=95)
                Image.fromarray(labels(scene)).save(annotations / f"{name}.png")
    return folder


def labels(scene: Scene) -> NDArray[np.uint8]:
    """For each pixel the number of its class, (height, width); 0 on strokes."""
    numbers = np.array([CLASSES[name][0] for name in GROUNDS], np.uint8)[scene.ground]
    for item in scene.items:
        numbers[item.mask] = CLASSES[item.kind][0]
    numbers[scene.unknown] = 0
    return numbers
