"""Which pictures `predict` reads, and where what it draws goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from hvt_backbones.errors import InputError
from hvt_backbones.predict import find_images


def plan_pictures(given: Sequence[str], folder: Path, suffix: str) -> list[tuple[Path, Path]]:
    """(picture, file to draw into) for all pictures that files and folders name.

    Below `folder` the files lie as the pictures do below the folder that they all have in common.

    Raises:
        InputError: a path that does not exist, two pictures for one file, or a file that is one of the pictures.
    """
    pictures = list(dict.fromkeys(find_images(given)))
    root = os.path.commonpath([path.absolute().parent for path in pictures])
    planned: dict[Path, Path] = {}
    for path in pictures:
        target = folder / path.absolute().relative_to(root).with_suffix(suffix)
        if target in planned:
            raise InputError(f"{path} and {planned[target]} would both be drawn into {target}: rename one of them")
        planned[target] = path
    originals = {path.resolve() for path in pictures}
    if clashes := [target for target in planned if target.resolve() in originals]:
        raise InputError(f"{clashes[0]} would be overwritten by its own prediction: give another --out-dir")
    return [(path, target) for target, path in planned.items()]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write `picture`; afterwards `path` holds all of it, or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        picture.save(partial, quality=95)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
