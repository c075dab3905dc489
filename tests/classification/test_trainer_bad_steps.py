"""Losses and gradients that are no numbers are left out, counted, and end a run when there are too many."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from classification.checkpoint import files as checkpoint
from classification.data.pictures import Pictures

from .saved_runs import Run, assert_same, forked_runs, newest


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let training pictures come out as `value`, from the `first` that is asked for to the `last`."""

    def spoil(value: float, *, first: int = 1, last: int = 10**6) -> None:
        load, count = Pictures.load, 0

        def spoiled(pictures: Pictures, index: int) -> tuple[torch.Tensor, int]:
            nonlocal count
            image, target = load(pictures, index)
            if "train" in pictures.filename(index):
                count += 1
                image = torch.full_like(image, value, dtype=torch.float32) if first <= count <= last else image
            return image, target

        monkeypatch.setattr(Pictures, "load", spoiled)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_of_bad_steps_ends_it_and_names_the_pictures(
    value: float, spoil: Callable, quick_run: Run, tmp_path: Path
) -> None:
    spoil(value, first=13)  # the second epoch
    status, error = quick_run("--train.max_bad_steps", "2")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith("error: training diverged at step 5 (epoch 2): loss nan, gradient norm ")
    assert "2 bad steps in a row" in error
    assert f"The last good checkpoint is {newest(tmp_path / 'run')};" in error
    names = (tmp_path / "run" / checkpoint.BAD_BATCH).read_text().splitlines()
    order = np.random.default_rng([0, 1]).permutation(12)[4:8]
    listing = sorted((tmp_path / "small data" / "train").rglob("*.png"))
    assert names == [str(listing[index]) for index in order]
    assert all(name in error for name in names)
    assert newest(tmp_path / "run").name == "step_00000003"


def test_a_bad_step_is_left_out_and_counted(
    spoil: Callable, quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--train.ema_decay", "0.9", "--output.save_steps", "1", "--output.keep_last", "9", "--epochs", "2")
    spoil(float("nan"), first=6, last=6)  # in the second step
    assert quick_run(*options)[0] == 0
    one, two, three = (checkpoint.load_state(checkpoint.step_folder(tmp_path / "run", step)) for step in (1, 2, 3))
    for part in ("model", "ema", "optimizer"):
        before, after = one[part], two[part]
        if part == "optimizer":  # its rate goes on with the schedule
            before, after = before["state"], after["state"]
        assert_same(before, after, part)
    assert not torch.equal(two["model"]["head.weight"], three["model"]["head.weight"])
    assert [(state["bad_steps"], state["skipped_steps"]) for state in (one, two, three)] == [(0, 0), (1, 1), (0, 1)]
    assert json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["skipped_steps"] == 1
    assert newest(tmp_path / "run").name == "step_00000006"


@pytest.mark.slow
def test_the_rank_with_the_bad_picture_names_it(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("bad_picture", pictures, tmp_path)
    assert result["statuses"] == [1, 1]
    # a batch of two pictures on each rank: those of the other one are not suspected
    names = (tmp_path / "run" / checkpoint.BAD_BATCH).read_text().splitlines()
    assert len(names) == 2
    assert str(pictures / "train" / "b" / "3.png") in names
    assert "Traceback" not in result["said"]
