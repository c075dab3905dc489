"""Runs whose checkpoints, weights and tables are compared, and what may happen to them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from classification.checkpoint import files as checkpoint

from .conftest import QUICK

Run = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = (checkpoint.LAST_WEIGHTS, checkpoint.BEST_WEIGHTS)
# a third of a second each on `small_data`: 3 steps per epoch, everything random on
RANDOM = (
    "--model.overrides.drop_path_rate", "0.3", "--train.ema_decay", "0.9", "--augmentation.mixup", "0.8",
    "--output.save_steps", "2", "--output.keep_last", "3",
)  # fmt: skip


def forked_runs(scenario: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("forked_runs.py")), scenario, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def newest(folder: Path) -> Path:
    return checkpoint.list_checkpoints(folder)[-1]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested values of a checkpoint, tensors bit by bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)), where
    else:
        assert ours == theirs, where


def learned(folder: Path) -> dict[str, Any]:
    """All that a run has computed: not its clock, nor where it lies."""
    last = newest(folder)
    state = checkpoint.load_state(last)
    for row in state["history"]:
        for name in ("ms_per_step", "images_per_second", "peak_memory_gib", "val_seconds", "seconds"):
            del row[name]
    del state["progress"]["seconds"], state["config"]["output"], state["config"]["data"]["workers"]
    del state["revision"]  # a commit may be made between two runs
    result = {"state": state}
    result |= {path.name: torch.load(path, weights_only=True) for path in sorted(last.glob("rank_*.pt"))}
    for name in WEIGHTS:
        with safe_open(folder / name, "pt") as file:
            result[name] = (load_file(folder / name), file.metadata())
    rows = (folder / checkpoint.LOG).read_text().splitlines()
    return result | {"rows": len(rows)}


def assert_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {
        *checkpoint.RUN_FILES, checkpoint.TENSORBOARD, checkpoint.RECONSTRUCTIONS,
    }  # fmt: skip
    assert all(re.fullmatch(r"step_\d{8}", path.name) for path in (folder / checkpoint.CHECKPOINTS).iterdir())


def settings_of(folder: Path) -> tuple[str, ...]:
    """Those of `quick_run` in `folder`."""
    return ("digits", *QUICK, "--data-dir", str(folder.parent / "small data"), "--output-dir", str(folder))


def full_disk_for(name: str, monkeypatch: pytest.MonkeyPatch, *, from_step: int) -> None:
    """Let the file `name` of later checkpoints lie on the device that is always full."""
    staging_folder = checkpoint.staging_folder

    class Staging(type(Path())):
        def mkdir(self, *args, **settings) -> None:
            super().mkdir(*args, **settings)
            os.symlink("/dev/full", self / name)

    def full(folder: Path, step: int) -> Path:
        place = staging_folder(folder, step)
        return Staging(place) if step >= from_step else place

    monkeypatch.setattr(checkpoint, "staging_folder", full)
