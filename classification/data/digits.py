"""Scikit-learn's handwritten digits as an ImageFolder: real pictures for a first run, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvt_backbones import InputError
from hvt_backbones.atomic import whole_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASS_NAMES = tuple(str(digit) for digit in range(10))
SPLITS = ("train", "val")
SIZE = 32  # side of the written pictures; the scans have 8 grey pixels a side, 0 (paper) to 16 (ink)
HELD_OUT_SEED = 0


def lay_out_digits(folder: Path) -> Path:
    """Write the 1,797 scans of `sklearn.datasets.load_digits` as `folder/{train,val}/{0..9}/*.png`.

    A third of each class, the same on every machine, is held out in `val`. The scans (UCI, Alpaydin and Kaynak, 1998;
    white ink on black) are enlarged to 32x32 pixels, bicubic. The folder appears complete or not at all; one that
    exists is used as it is.

    Returns:
        `folder`.

    Raises:
        InputError: scikit-learn is missing, or the folder holds something else or cannot be written.
    """
    if _is_complete(folder):
        return folder
    scans = _read_scans()
    try:
        with whole_folder(folder) as staging:
            if staging is not None:
                _write_pictures(staging, *scans)
    except InputError as error:
        raise InputError(f"data.dir: {error}.") from error
    if not _is_complete(folder):
        raise InputError(f"data.dir: {folder} exists and is not a layout of the digits; name an empty or new folder.")
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / split / name).is_dir() for split in SPLITS for name in CLASS_NAMES)


def _read_scans() -> tuple[NDArray, NDArray, list[NDArray]]:
    """The scans, (1797, 64), their digits, (1797,), and the indices of those of each split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError("data.kind: digits needs scikit-learn; run `pip install scikit-learn`.") from None
    import numpy as np

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=HELD_OUT_SEED)
    return scans, labels, indices


def _write_pictures(folder: Path, scans: NDArray, labels: NDArray, indices: list[NDArray]) -> None:
    import numpy as np
    from PIL import Image

    for split, members in zip(SPLITS, indices, strict=True):
        for name in CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
        for index in members:
            grey = (scans[index].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
            picture = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            picture.save(folder / split / str(labels[index]) / f"{index:04d}.png")
