"""Runs that are killed end as one that is not."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.data.pictures import Noise
from classification.signals import StopRequest
from classification.trainer import Trainer

from .saved_runs import Run, assert_nothing_else, assert_same, forked_runs, learned, newest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "workers", "kills", "masked"),
    [(1, 0, 20, 0), (2, 0, 20, 0), (1, 1, 6, 0), (2, 0, 6, 1)],
    ids=["alone", "two", "workers", "simmim"],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    world: int, workers: int, kills: int, masked: int, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    result = forked_runs("relay", pictures, folder, world, workers, kills, masked)
    assert result["whole"] == result["end"] == [0] * world
    happened = result["kills"]
    assert [kill["status"] for kill in happened] == [-signal.SIGKILL] * kills
    # a rank that was left alone ended by itself, with its line
    assert {status for kill in happened for status in kill["others"]} <= {-signal.SIGKILL, 1}
    within = Counter(kill["phase"] for kill in happened)
    if kills == 20:
        least = {"step": 5, "save": 1, "seal": 3, "weights": 2, "validation": 3}
        assert all(within[phase] >= count for phase, count in least.items()), within
        assert world == 1 or [1] in [kill["others"] for kill in happened]
    assert_same(learned(folder / "whole"), learned(folder / "killed"))
    assert_nothing_else(folder / "killed")
    assert "Traceback" not in (folder / "killed.txt").read_text()


def test_a_run_killed_before_its_first_checkpoint_begins_again(quick_run: Run, tmp_path: Path) -> None:
    staging = checkpoint.staging_folder(tmp_path / "run", 3)
    staging.mkdir(parents=True)
    (staging / checkpoint.STATE).write_bytes(b"half of it")
    (tmp_path / "run" / ".model_last.0123abcd.partial.safetensors").write_bytes(b"half of it")
    (tmp_path / "run" / ".tmpGVeNg8").write_bytes(b"half of it")
    assert quick_run("--resume", "auto", "--epochs", "1")[0] == 0
    assert_nothing_else(tmp_path / "run")
    assert checkpoint.LAST_WEIGHTS in {path.name for path in (tmp_path / "run").iterdir()}


def test_resuming_at_step_100000_replays_nothing(
    quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million pictures; five steps' worth of checkpoint, moved far into the run."""
    options = (
        "digits", *quick, "--data.kind", "synthetic", "--data.synthetic_images", "1281167", "--epochs", "300",
        "--batch-size", "128", "--data.input_size", "[3, 8, 8]", "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    Trainer(parse_command_line(options)).saver.save()
    state = checkpoint.load_state(newest(tmp_path / "run"))
    epochs, step = divmod(100_000, state["steps_per_epoch"])
    row = {"epoch": 1, "step": 1, "top1": 0.0, "val_seconds": 1.0}
    state |= {"step": 100_000, "history": [row] * epochs}
    staging = checkpoint.staging_folder(tmp_path / "run", 100_000)
    shutil.copytree(newest(tmp_path / "run"), staging)
    (staging / checkpoint.MANIFEST).unlink()
    torch.save(state, staging / checkpoint.STATE)
    checkpoint.seal_checkpoint(staging, tmp_path / "run", 100_000)
    AcceleratorState._reset_state(reset_partial_state=True)

    class Reached(Exception):
        pass

    seen, load = [], Noise.load

    def first_step(group: list, stop: StopRequest) -> None:
        seen.extend(group)
        raise Reached

    loaded = []
    monkeypatch.setattr(Noise, "load", lambda pictures, index: loaded.append(index) or load(pictures, index))
    trainer = Trainer(parse_command_line([*options, "--resume", "auto"]))
    trainer.learner.train_step = first_step
    with pytest.raises(Reached):
        trainer.run()
    assert 128 <= len(loaded) <= 512
    assert trainer.progress.step == 100_000
    order = np.random.default_rng([0, epochs]).permutation(1_281_167)
    assert seen[0].indices.tolist() == order[step * 128 : (step + 1) * 128].tolist()
