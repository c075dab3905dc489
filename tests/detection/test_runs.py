"""What happens to a run: losses that are no numbers, and another schedule on resuming."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from detection.train import main as train
from runner.checkpoints import read_checkpoint
from runner.config import parse_value
from tests.dense_runs import error_line, logged, write_config

CPU = ("--device", "cpu")
EPOCHS = ("train_cfg.max_epochs=4", "train_cfg.val_interval=9")
SCHEDULE = [dict(type="MultiStepLR", begin=0, end=2, by_epoch=True, milestones=[1], gamma=0.1)]


@pytest.fixture
def scheduled(config: Path, tmp_path: Path) -> Path:
    cfg = Config.fromfile(config)
    cfg.param_scheduler = SCHEDULE
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2, val_interval=9)
    return Path(write_config(tmp_path / "scheduled.py", cfg.to_dict()))


@pytest.mark.slow
def test_another_schedule_is_told_refused_or_holds(
    scheduled: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    run = [str(scheduled), "--work-dir", str(tmp_path / "run"), *CPU]
    assert train(run) == 0
    said = "".join(capfd.readouterr())
    assert "Saving checkpoint" in said
    assert not any(word in said for word in ("Warning", "WARNING", "paramwise_options", "OneDL"))
    moments = read_checkpoint(tmp_path / "run" / "epoch_2.pth")["optimizer"]["state"]
    resumed = [*run, "--resume"]
    options = ["--cfg-options", *EPOCHS, "param_scheduler.0.end=4", "param_scheduler.0.milestones=[3]"]
    capfd.readouterr()
    assert train([*resumed, *options]) == 2
    line = error_line(capfd)
    assert "param_scheduler.0.end 2 there, 4 here; param_scheduler.0.milestones [1] there, [3] here" in line
    assert "--allow-changes" in line
    assert train([*resumed, "--allow-changes", *options]) == 0
    rates = {entry["epoch"]: entry["lr"] for entry in logged(tmp_path / "run") if "loss" in entry}
    assert rates[3] == pytest.approx(1e-3)
    assert rates[4] == pytest.approx(1e-4)
    after = read_checkpoint(tmp_path / "run" / "epoch_4.pth")["optimizer"]["state"]
    steps = {int(values["step"]) for values in moments.values()}
    assert {int(values["step"]) for values in after.values()} == {2 * step for step in steps}
    # a run that is only longer, elsewhere and told otherwise is the same
    free = ["--cfg-options", "train_cfg.max_epochs=3", "train_dataloader.num_workers=1", "log_level=WARNING"]
    assert train([*run[:1], "--work-dir", str(tmp_path / "longer"), *CPU,
                  "--resume", str(tmp_path / "run" / "epoch_2.pth"), *free]) == 0  # fmt: skip


@pytest.mark.parametrize(("loss", "accumulated"), [(float("nan"), 1), (float("inf"), 2)])
def test_bad_steps_are_left_out_and_end_a_run(
    loss: float, accumulated: int, monkeypatch: pytest.MonkeyPatch, scheduled: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    from mmdet.models import MaskRCNN

    parse, count = MaskRCNN.parse_losses, 0
    bad = {2, 4, 5, 6, 7, 8, 9}

    def spoiled(model: Any, losses: Any) -> Any:
        nonlocal count
        total, variables = parse(model, losses)
        count += 1
        return (total * loss if -(-count // accumulated) in bad and count % accumulated == 0 else total), variables

    monkeypatch.setattr(MaskRCNN, "parse_losses", spoiled)
    options = [*EPOCHS, f"optim_wrapper.accumulative_counts={accumulated}"]
    arguments = [str(scheduled), "--work-dir", str(tmp_path / "run"), *CPU, "--max-bad-steps", "2"]
    assert train([*arguments, "--cfg-options", *options]) == 1
    said = capfd.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: training diverged at step {5 * accumulated} ")
    assert "2 bad steps in a row" in line
    names = (tmp_path / "run" / "bad_batch.txt").read_text().splitlines()
    assert len(names) == 2 * accumulated
    assert all(Path(name).is_file() and name in line for name in names)
    saved = read_checkpoint(tmp_path / "run" / "epoch_1.pth")
    assert {int(values["step"]) for values in saved["optimizer"]["state"].values()} == {2 if accumulated == 1 else 1}
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


VALUES = {
    "[(1,2),[3,4]]": [(1, 2), [3, 4]],
    "(1,2),(3,4)": [(1, 2), (3, 4)],
    "[(96, 266), (128, 266)]": [(96, 266), (128, 266)],
    "((1,2),(3,))": ((1, 2), (3,)),
    "[{'type':'X','lr':-1e-3},{type: Y, betas: (0.9,0.99)}]": [
        {"type": "X", "lr": -1e-3}, {"type": "Y", "betas": (0.9, 0.99)}
    ],
    "[dict(type='A',k=[1,(2,)]),None]": [{"type": "A", "k": [1, (2,)]}, None],
    "['a,b',c,True]": ["a,b", "c", True],
    "'a (1'": "a (1",
    "1,2": [1, 2],
    "data(1)/it's.png": "data(1)/it's.png",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_values_of_options_hold_one_another(text: str) -> None:
    assert repr(parse_value(text)) == repr(VALUES[text])  # tuples are no lists, True is not 1
