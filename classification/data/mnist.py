"""Pictures in the files of MNIST (LeCun et al., 1998), which Fashion-MNIST (arXiv:1708.07747) has too."""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hvt_backbones import InputError

from .readers import Reader


class ReaderMnist(Reader):
    """`folder/SPLIT-images-idx3-ubyte` and `folder/SPLIT-labels-idx1-ubyte`, as they are or with `.gz`.

    They are read whole: 47 MB for 60,000 pictures of 28x28. What we call `val` is `t10k` there.

    Raises:
        InputError: no such files; files of another kind, cut, or of different lengths.
    """

    def __init__(self, folder: Path, split: str) -> None:
        if split == "val" and not _find(folder, "val", "images-idx3"):
            split = "t10k"
        self.where = f"{folder / split}-images-idx3-ubyte"
        self.images, labels = _read(folder, split, "images-idx3", 3), _read(folder, split, "labels-idx1", 1)
        if len(self.images) != len(labels):
            raise InputError(f"data.dir: {self.where} has {len(self.images)} pictures for {len(labels)} labels.")
        self.targets = labels.astype(np.int64)
        self.class_to_idx = {str(index): index for index in range(int(labels.max()) + 1)}

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        file = io.BytesIO()
        Image.fromarray(self.images[index]).save(file, format="BMP")  # the quickest to write and to read
        file.seek(0)
        return file, int(self.targets[index])

    def filename(self, index: int) -> str:
        return f"{self.where}: picture {index}"


def _find(folder: Path, split: str, what: str) -> Path | None:
    names = (f"{split}-{what}-ubyte", f"{split}-{what}-ubyte.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read(folder: Path, split: str, what: str, axes: int) -> NDArray[np.uint8]:
    """The numbers of an idx file: two zero bytes, 8 for bytes, the count of axes, their lengths, big-endian."""
    path = _find(folder, split, what)
    if path is None:
        raise InputError(f"data.dir: {folder} holds no {split}-{what}-ubyte or {split}-{what}-ubyte.gz.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError) as error:
        raise InputError(f"data.dir: {path} cannot be read ({error}); copy it again.") from None
    lengths = [int.from_bytes(content[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    start = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) - start != math.prod(lengths) or not lengths[0]:
        raise InputError(f"data.dir: {path} is no idx file of {axes} axes of bytes, or is cut; copy it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(lengths)
