"""What a run says while it goes: one line on the terminal, a row of `log.csv` per epoch, TensorBoard events."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import TENSORBOARD


def peak_memory(device: torch.device) -> float:
    """GiB that tensors have taken on `device` at most; on the CPU, what the whole process has."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # getrusage counts KiB, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def duration(seconds: float) -> str:
    """`2 d 3 h`, `3 h 12 min`, `4 min 5 s`, `6 s`."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    parts: list[str] = []
    for name, size in units:
        if whole >= size or (name == "s" and not parts):
            parts.append(f"{whole // size} {name}")
            whole %= size
    return " ".join(parts[:2])


def listed(names: Sequence[str], shown: int = 4) -> str:
    """`a, b, c, d and 3 more`."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


class EventWriter:
    """TensorBoard events in `folder/tensorboard`, or nothing where it is off or not installed.

    Args:
        folder: of the run.
        wanted: whether events are asked for.
        step: the run goes on from here; later events of an earlier try are hidden.
    """

    def __init__(self, folder: Path, *, wanted: bool, step: int) -> None:
        self._folder, self._step = folder / TENSORBOARD, step
        self._wanted = wanted and find_spec("tensorboard") is not None
        self._writer: Any = None

    def add(self, step: int, **values: float) -> None:
        if not self._wanted:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)
        with self._expendable():
            for name, value in values.items():
                self._writer.add_scalar(name.replace("__", "/"), value, step)
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._expendable():
                self._writer.close()

    @contextlib.contextmanager
    def _expendable(self) -> Iterator[None]:
        """A full disk is for the checkpoints to report: without events a run can go on."""
        try:
            yield
        except OSError as error:
            self._wanted, self._writer = False, None
            print(f"warning: no more TensorBoard events in {self._folder} ({error.strerror})", flush=True)
