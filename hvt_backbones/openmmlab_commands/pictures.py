"""Which pictures `predict` reads, and where what it draws goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import InputError
from hvt_backbones.predict import find_images


def plan_pictures(
    given: Sequence[str], folder: Path, suffix: str, find: Callable[[Sequence[str]], list[Path]] = find_images
) -> list[tuple[Path, Path]]:
    """(picture, file to draw into) for all pictures, or whatever `find` finds, that files and folders name.

    Below `folder` the files lie as the pictures do below the folder that they all have in common.

    Raises:
        InputError: a path that does not exist, two pictures for one file, or a file that is one of the pictures.
    """
    pictures = list(dict.fromkeys(find(given)))
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
    """Write `picture`; afterwards `path` holds all of it, or what it held before.

    Raises:
        InputError: it cannot be written.
    """
    with whole_file(path) as partial:
        picture.save(partial, quality=95)
