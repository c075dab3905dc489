"""Drawn pictures in the layout of COCO 2017: polygons, run lengths, a crowd now and then, pictures without objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvt_backbones.atomic import whole_folder

from .shapes import KINDS, PICTURE_SIZES, Item, draw_scene, scene_generator

CATEGORIES = {name: number for number, name in enumerate(sorted(KINDS), 1)}
EMPTY_EVERY = 20  # pictures, of which one has no object
CROWD_EVERY = 10  # pictures, of which one has a crowd


def write_coco(folder: Path, *, train: int, val: int, seed: int = 0) -> Path:
    """Write so many pictures as `folder/{train2017,val2017}/*.jpg`, `folder/annotations/instances_*.json`.

    Returns:
        `folder`; one that holds something is used as it is.

    Raises:
        InputError: it cannot be written.
    """
    with whole_folder(folder) as staging:
        if staging is None:
            return folder
        (staging / "annotations").mkdir()
        for split, count in {"train2017": train, "val2017": val}.items():
            (staging / split).mkdir()
            content = _write_pictures(staging / split, count, seed)
            (staging / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def _write_pictures(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The pictures of one split; returns the content of its annotation file."""
    images, annotations = [], []
    for number in range(1, count + 1):
        rng = scene_generator(seed, folder.name, number)
        height, width = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
        shapes = 0 if number % EMPTY_EVERY == 0 else int(rng.integers(2, 7))
        scene = draw_scene(rng, height, width, shapes=shapes, crowd=shapes > 0 and number % CROWD_EVERY == 5)
        name = f"{number:012d}.jpg"
        Image.fromarray(scene.picture).save(folder / name, quality=95)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for item in scene.items:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **_annotation(item)})
    categories = [{"id": number, "name": name, "supercategory": "shape"} for name, number in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(item: Item) -> dict[str, Any]:
    """Of what is seen of an item: a polygon where that is a simple one, else run lengths."""
    left, top, right, bottom = item.box
    if item.outline is not None:
        segmentation: Any = [item.outline.round(2).ravel().tolist()]
    else:
        segmentation = {"size": list(item.mask.shape), "counts": run_lengths(item.mask)}
    return {
        "category_id": CATEGORIES[item.kind],
        "bbox": [left, top, right - left, bottom - top],
        "area": int(item.mask.sum()),
        "segmentation": segmentation,
        "iscrowd": int(item.crowd),
    }


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, pixels outside and inside in turn, beginning outside."""
    pixels = mask.ravel(order="F")
    turns = np.flatnonzero(np.diff(pixels, prepend=False))
    return np.diff(turns, prepend=0, append=pixels.size).tolist()
