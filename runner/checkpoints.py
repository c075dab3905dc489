"""Checkpoints are not trusted: whatever MMEngine reads goes through the readers of this library first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hvt_backbones.errors import InputError
from hvt_backbones.openmmlab import check_checkpoint
from hvt_backbones.weights.files import read_weights


def load(filename: str, map_location: Any = None, logger: Any = "current") -> dict[str, Any]:
    """In place of MMEngine's `CheckpointLoader.load_checkpoint`."""
    return read_checkpoint(filename, map_location)


def read_checkpoint(source: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint, as MMEngine takes it; nothing in the file is run, now or later.

    Args:
        source: a path, an http(s) or file URL, or "hf-hub:org/name".
        map_location: as that of `torch.load`.

    Raises:
        WeightsError: the file cannot be found, is damaged, or needs code to be read.
    """
    from mmengine.runner.checkpoint import get_torch_safe_globals

    path = check_checkpoint(source)
    try:
        # what MMEngine writes beside the weights; `getattr`, which it lists too, was refused by the check unless it
        # names a statistic of MMEngine's log
        with torch.serialization.safe_globals(get_torch_safe_globals()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception:  # checked, so that it is only of another kind than MMEngine's: the weights alone
        return {"state_dict": read_weights(path).tensors}
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path} holds no dictionary of weights: pass a checkpoint")
    meta = checkpoint.get("meta")
    if isinstance(meta, dict):
        # the text of the configuration, which is Python: on resuming MMEngine runs it to count the GPUs of before
        meta.pop("config", None)
        meta.pop("cfg", None)
    return checkpoint


def find_latest(work_dir: str) -> Path | None:
    """The checkpoint that the last run in `work_dir` wrote last; None where none did. The folder may have moved."""
    record = Path(work_dir) / "last_checkpoint"
    if not record.is_file():
        return None
    path = Path(record.read_text().strip())
    beside = record.with_name(path.name)
    return beside if beside.is_file() else path
