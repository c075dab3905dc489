"""Runs that go on with other settings, at another place, or with other data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.trainer import Trainer

from .saved_runs import RANDOM, Run, assert_same, learned, newest, settings_of


def test_changed_settings_are_shown_and_refused(quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert quick_run(*RANDOM)[0] == 0
    changed = ("--epochs", "3", "--lr", "1e-4", "--resume", "auto")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, error = quick_run(*RANDOM, *changed)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: output.resume: settings differ from the checkpoint's: ")
    assert "optimizer.lr 0.002 there, 0.0001 here; train.epochs 2 there, 3 here. " in error
    assert "--allow-changes" in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    trainer = Trainer(parse_command_line([*settings_of(tmp_path / "run"), *RANDOM, *changed, "--allow-changes"]))
    shown = capsys.readouterr().out
    assert "changed: optimizer.lr 0.002 there, 0.0001 here\n" in shown
    assert "changed: train.epochs 2 there, 3 here\n" in shown
    # they are not only shown
    assert trainer.learner.scheduler.base_values == [1e-4] * len(trainer.learner.raw_optimizer.param_groups)
    assert trainer.learner.scheduler.t_initial == 3 * trainer.progress.steps_per_epoch
    assert trainer.run()["epochs"] == 3


def test_where_and_how_a_run_goes_on_is_free(quick_run: Run, small_data: Path, tmp_path: Path) -> None:
    assert quick_run(*RANDOM)[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(newest(tmp_path / "run"))
    shutil.copytree(small_data, tmp_path / "moved")
    free = (
        "--data-dir", str(tmp_path / "moved"), "--data.workers", "1", "--train.threads", "1", "--device", "auto",
        "--output.log_steps", "1", "--output.keep_best", "0", "--parallel.timeout", "300", "--data.on_error", "skip",
    )  # fmt: skip
    assert quick_run(*RANDOM, *free, "--resume", "auto")[0] == 0
    whole, moved = learned(tmp_path / "whole"), learned(tmp_path / "run")
    for result in (whole, moved):
        del result["state"]["config"]
    assert_same(whole, moved)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--batch-size", "2"), "data.batch_size 4 there, 2 here; global batch 4 there, 2 here"),
        (("--train.accumulation", "2"), "train.accumulation 1 there, 2 here; global batch 4 there, 8 here"),
    ],
)
def test_another_global_batch(options: tuple[str, ...], difference: str, quick_run: Run, tmp_path: Path) -> None:
    assert quick_run(*RANDOM, "--epochs", "4")[0] == 0
    half = str(checkpoint.step_folder(tmp_path / "run", 9))
    status, error = quick_run(*RANDOM, "--epochs", "4", *options, "--resume", half)
    assert (status, error.count("\n")) == (2, 1)
    assert difference in error
    settings = [*settings_of(tmp_path / "run"), *RANDOM, "--epochs", "4", *options, "--resume", half, "--allow-changes"]
    trainer = Trainer(parse_command_line(settings))
    assert trainer.progress.step == 3 * trainer.progress.steps_per_epoch  # as many epochs
    assert trainer.run()["steps"] == 4 * trainer.progress.steps_per_epoch


def test_data_that_lost_pictures_is_not_the_same(quick_run: Run, small_data: Path) -> None:
    assert quick_run()[0] == 0
    (small_data / "train" / "dark" / "5.png").unlink()
    status, error = quick_run("--resume", "auto")
    assert status == 2
    assert "training pictures 12 there, 11 here" in error
