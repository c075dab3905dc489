"""Pictures of detection and segmentation: read alike in training, testing and prediction, and where drawings go."""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import InputError
from hvt_backbones.images import ON_ITS_SIDE, TURNS, find_images, open_picture, orientation, read_image

from .findings import describe

TURNED_BY_EXIF = ("color", "grayscale")  # how MMCV calls what OpenCV brings upright by itself
BACKENDS = ("cv2", "pillow")  # those of MMCV that do


def load_as_annotated(
    load: Callable[..., dict[str, Any] | None], loader: LoadImageFromFile, results: dict[str, Any]
) -> dict[str, Any] | None:
    """In place of `load`, MMCV's `LoadImageFromFile.transform`: turn pictures as their annotations or maps are.

    Upright where these have the size of the upright picture, and where there are none; as stored where they have the
    size of the picture as it is stored. Where both sizes are the same (upside down, mirrored, square), as stored: maps
    and boxes are drawn over the pixels of a file, and of a tool that turns them first a picture on its side shows it.
    """
    path = results["img_path"]
    turn, kind = _turn_of(path)
    if loader.color_type not in TURNED_BY_EXIF or loader.imdecode_backend not in BACKENDS:
        return load(loader, results)
    as_stored = copy.copy(loader)
    as_stored.color_type = f"{loader.color_type}_ignore_orientation"
    found = _load_turned_tiff(loader, results, turn) if kind == "TIFF" and turn in TURNS else load(as_stored, results)
    if found is None:
        return None
    stored = found["img"].shape[:2]
    upright = stored[::-1] if turn in ON_ITS_SIDE else stored
    wanted, of = _size_of_annotations(results)
    if wanted is not None and wanted not in (stored, upright):
        raise InputError(
            f"{of} is {wanted[0]} x {wanted[1]} pixels, its picture {path} {upright[0]} x {upright[1]}"
            + ("" if stored == upright else f" upright and {stored[0]} x {stored[1]} as stored")
            + " (height x width): annotate the picture as it is, or leave it out"
        )
    if turn in TURNS and (wanted is None or (wanted == upright != stored)):
        found["img"] = turned(found["img"], turn)
        found["img_shape"] = found["ori_shape"] = found["img"].shape[:2]
    return found


def _load_turned_tiff(loader: LoadImageFromFile, results: dict[str, Any], turn: int) -> dict[str, Any]:
    """A picture as it is stored. Of these, OpenCV and Pillow bring upright what they were told to leave, or fail."""
    grey = loader.color_type == "grayscale"
    upright = np.asarray(read_image(results["img_path"], 1 if grey else 3))
    pixels = turned(upright if grey else upright[..., ::-1], {6: 8, 8: 6}.get(turn, turn))  # others undo themselves
    results["img"] = pixels.astype(np.float32) if loader.to_float32 else pixels
    results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
    return results


def _turn_of(path: str) -> tuple[int, str | None]:
    """EXIF's orientation of a file, and what Pillow calls its format.

    Raises:
        InputError: its pixels are floating-point numbers, of which OpenCV makes black.
    """
    try:
        with open_picture(path) as picture:
            mode, turn, kind = picture.mode, orientation(picture), picture.format
    except Exception:  # a format of another reader, or damaged: the reader of the pixels says so
        return 1, None
    if mode == "F":
        raise InputError(
            f"picture {path} cannot be read (its pixels are floating-point numbers, of which nothing says what is "
            "white): save it with 8 or 16 bits"
        )
    return turn, kind


def _size_of_annotations(results: dict[str, Any]) -> tuple[tuple[int, int] | None, str]:
    """The (height, width) of the picture that was annotated, and what says so; None where nothing does."""
    if path := results.get("seg_map_path"):
        try:
            with open_picture(path) as picture:
                return picture.size[::-1], str(path)
        except Exception:  # the reader of maps says what is wrong, and knows other formats
            return None, ""
    if "instances" in results and results.get("height") and results.get("width"):
        return (int(results["height"]), int(results["width"])), "the size in the annotation file"
    return None, ""


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """(H, W, ...) pixels as EXIF's orientation `turn` says that they are looked at."""
    if turn in ON_ITS_SIDE:
        pixels = pixels.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def read_pixels(path: Path) -> np.ndarray:
    """A picture as training reads it, upright: (H, W, 3), uint8, blue first.

    Raises:
        InputError: it cannot be read.
    """
    if path.exists() and path.stat().st_size == 0:
        raise InputError(f"picture {path} is empty (zero bytes): copy or download it again")
    try:
        return LoadImageFromFile().transform({"img_path": str(path)})["img"]
    except InputError:
        raise
    except Exception as error:  # OpenCV and MMCV have many
        raise InputError(f"picture {path} cannot be read ({describe(error)}): replace it or leave it out") from error


@contextlib.contextmanager
def resizing(what: str) -> Iterator[None]:
    """
    Raises:
        InputError: OpenCV refuses what the pipeline asks, as to resize a thin picture to no row.
    """
    try:
        yield
    except cv2.error as error:
        raise InputError(f"{what} cannot be resized ({describe(error)}): leave it out") from error


def plan_pictures(
    given: Sequence[str], folder: Path, suffix: str, find: Callable[[Sequence[str]], list[Path]] = find_images
) -> list[tuple[Path, Path]]:
    """(picture, file to draw into) for all pictures, or whatever `find` finds, that files and folders name.

    Below `folder` the files lie as the pictures do below the folder that they all have in common, with `suffix` in
    place of their own; behind their own where several differ in that alone.

    Raises:
        InputError: a path that does not exist, or a file to draw into that is one of the pictures.
    """
    pictures = list(dict.fromkeys(find(given)))
    root = os.path.commonpath([path.absolute().parent for path in pictures])
    relative = [path.absolute().relative_to(root) for path in pictures]
    alike = Counter(path.with_suffix("") for path in relative)
    planned: dict[Path, Path] = {}
    for path, below in zip(pictures, relative, strict=True):
        name = below.name if alike[below.with_suffix("")] > 1 else below.stem
        target = folder / below.with_name(name + suffix)
        while target in planned:  # a.jpg.png beside a.jpg and a.png
            name += below.suffix or "_"
            target = folder / below.with_name(name + suffix)
        planned[target] = path
    originals = {path.resolve() for path in pictures}
    if clashes := [target for target in planned if target.resolve() in originals]:
        raise InputError(f"{clashes[0]} would be overwritten by its own prediction: give another --out-dir")
    return [(path, target) for target, path in planned.items()]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write `picture`; afterwards `path` holds all of it, or what it held before.

    Raises:
        InputError: it cannot be written.
    """
    with whole_file(path) as partial:
        picture.save(partial, quality=95)
