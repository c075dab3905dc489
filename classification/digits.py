"""Scikit-learn's handwritten digits as an ImageFolder: real pictures for a first run, without a download."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hvt_backbones import InputError

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
    if all((folder / split / name).is_dir() for split in SPLITS for name in CLASS_NAMES):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"data.dir: {folder} exists and is not a layout of the digits; name an empty or new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        reason = f"cannot write the digits to {folder} ({error.strerror})"
        raise InputError(f"data.dir: {reason}; give another folder.") from None
    try:
        _write_pictures(staging)
        staging.chmod(0o755)  # mkdtemp's own are for this user alone
        os.replace(staging, folder)
    except OSError as error:
        if not (folder / SPLITS[-1] / CLASS_NAMES[-1]).is_dir():  # else another process was first
            raise InputError(f"data.dir: cannot write the digits to {folder} ({error.strerror}).") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _write_pictures(folder: Path) -> None:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise InputError("data.kind: digits needs scikit-learn; run `pip install scikit-learn`.") from None
    import numpy as np
    from PIL import Image

    scans, labels = load_digits(return_X_y=True)
    indices = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=labels, random_state=HELD_OUT_SEED)
    for split, members in zip(SPLITS, indices, strict=True):
        for name in CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
        for index in members:
            grey = (scans[index].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
            picture = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            picture.save(folder / split / str(labels[index]) / f"{index:04d}.png")
