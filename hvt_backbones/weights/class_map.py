"""Which rows of a checkpoint's head the classes of a model take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WeightsError
from .report import shown

ClassMap = Sequence[int] | Tensor | str | os.PathLike


def read_class_map(class_map: ClassMap) -> Tensor:
    """The rows, int64.

    Raises:
        WeightsError: a file that cannot be read, or no list of whole numbers.
    """
    if isinstance(class_map, str | os.PathLike):
        path = Path(class_map)
        try:
            class_map = [int(line) for line in path.read_text(encoding="utf-8").split()]
        except (OSError, ValueError) as error:
            raise WeightsError(f"class_map {path}: give a text file with one class index a line ({error})") from error
    try:
        rows = torch.as_tensor(class_map)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # what torch raises depends on the value
        rows = None
    if rows is None or rows.dim() != 1 or not _are_whole(rows):
        raise WeightsError(
            f"class_map is {shown(class_map)}: give a list of class indices, one for each class of the model"
        )
    return rows.long()


def _are_whole(numbers: Tensor) -> bool:
    return not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
