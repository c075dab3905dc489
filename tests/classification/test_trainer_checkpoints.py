"""What a checkpoint holds, which ones are kept, and whose they are."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from classification import distributed as parallel
from classification.checkpoint import files as checkpoint
from classification.checkpoint import manager
from classification.checkpoint.shards import read_shards, read_whole, write_shards
from classification.command_line import parse_command_line
from classification.export import main as export
from classification.trainer import Trainer
from hvt_backbones import InputError

from .saved_runs import (
    RANDOM,
    Run,
    assert_nothing_else,
    assert_same,
    forked_runs,
    full_disk_for,
    learned,
    newest,
    settings_of,
)


def test_what_a_checkpoint_holds(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run(*RANDOM, "--train.accumulation", "2", "--train.amp", "bf16")[0] == 0
    folder = newest(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {checkpoint.STATE, "rank_00000.pt", checkpoint.MANIFEST}
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    config = parse_command_line(
        [*settings_of(tmp_path / "run"), *RANDOM, "--train.accumulation", "2", "--train.amp", "bf16"]
    )
    trainer = Trainer(replace(config, output=replace(config.output, resume="auto")))
    assert_same(state["model"], dict(trainer.learner.model.state_dict()))
    assert_same(state["ema"], dict(trainer.learner.ema.module.state_dict()))
    trained = {name for name, parameter in trainer.learner.model.named_parameters() if parameter.requires_grad}
    moments = state["optimizer"]["state"]
    assert moments.keys() == trained
    assert all(moments[name].keys() == {"step", "exp_avg", "exp_avg_sq"} for name in trained)
    assert {float(moment["step"]) for moment in moments.values()} == {2.0}
    assert state["scheduler"] == trainer.learner.scheduler.state_dict()
    assert state["scaler"] is None  # of fp16 alone; see below
    assert (state["step"], state["steps_per_epoch"], state["processes"]) == (2, 1, 1)  # 12 pictures, 8 a step
    assert (state["global_batch"], state["pictures"]) == (8, 12)
    assert [row["epoch"] for row in state["history"]] == [1]  # the second one's evaluation comes after it
    assert state["config"] == trainer.config.as_dict() | {"output": state["config"]["output"]}
    assert state["description"] == trainer.description
    assert state["revision"] == manager.revision()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", state["revision"]), "the tests run in a checkout"
    generators = torch.load(folder / "rank_00000.pt", weights_only=True)
    assert_same(generators["torch"], torch.get_rng_state())
    assert generators["python"] == random.getstate()
    assert_same(generators["numpy"][1], torch.from_numpy(np.random.get_state()[1].astype(np.int64)))  # noqa: NPY002
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 2
    assert manifest["files"].keys() == {checkpoint.STATE, "rank_00000.pt"}


def test_the_loss_scale_comes_back(quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 needs an accelerator; its scaler does not."""
    settings = [*settings_of(tmp_path / "run"), "--resume", "auto"]
    assert quick_run("--epochs", "1")[0] == 0
    build = parallel.build_accelerator

    def scaled(*args: object, **kwargs: object) -> object:
        accelerator = build(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
        return accelerator

    monkeypatch.setattr(parallel, "build_accelerator", scaled)
    settings += ["--epochs", "1"]
    trainer = Trainer(parse_command_line(settings))
    trainer.accelerator.scaler.load_state_dict({**trainer.accelerator.scaler.state_dict(), "scale": 2.0**5})
    trainer.progress.step += 1
    trainer.saver.save()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert Trainer(parse_command_line(settings)).accelerator.scaler.state_dict()["scale"] == 2.0**5


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    history = [{"step": step, "top1": top1} for step, top1 in ((10, 50.0), (20, 70.0), (30, 70.0), (40, 60.0))]
    for step in range(5, 50, 5):
        checkpoint.step_folder(tmp_path, step).mkdir(parents=True)

    def kept(**settings: int) -> list[int]:
        checkpoint.prune(tmp_path, history, **settings)
        return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)]

    assert kept(keep_last=3, keep_best=3) == [20, 30, 35, 40, 45]
    assert kept(keep_last=2, keep_best=1) == [20, 40, 45]  # of two equal ones the first, as in model_best
    assert kept(keep_last=1, keep_best=0) == [45]
    assert [path.name for path in (tmp_path / checkpoint.CHECKPOINTS).iterdir()] == ["step_00000045"]


def test_a_run_keeps_its_last_and_its_best(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run("--epochs", "4", "--output.keep_last", "2", "--output.keep_best", "1")[0] == 0
    steps = {checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")}
    best = json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["best"]["epoch"]
    assert steps == {9, 12} | {3 * best}


@pytest.mark.slow
def test_two_runs_in_one_folder_at_the_same_time(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("locked", pictures, tmp_path)
    assert (result["first"], result["second"]) == ([0, 0], [2, 2])
    said = result["said"]
    assert said.count("another process is training into") == 2
    assert "Traceback" not in said
    assert "lost contact" not in said
    assert_nothing_else(tmp_path / "run")


def test_overwrite_starts_anew(quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick_run(*RANDOM, "--epochs", "1", "--seed", "1")[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "anew")
    assert quick_run(*RANDOM, "--epochs", "3")[0] == 0

    class Killed(Exception):
        pass

    def die(*args: object, **settings: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("classification.trainer.evaluate", die)
        with pytest.raises(Killed):
            quick_run(*RANDOM, "--epochs", "1", "--seed", "1", "--overwrite")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000003"]
    assert quick_run(*RANDOM, "--epochs", "1", "--seed", "1", "--resume", "auto")[0] == 0
    assert_same(learned(tmp_path / "anew"), learned(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["epochs"] == 1


def test_an_overwritten_run_is_there_until_the_new_one_is_saved(
    quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick_run()[0] == 0
    before = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")]
    full_disk_for(checkpoint.STATE, monkeypatch, from_step=0)
    assert quick_run("--seed", "1", "--overwrite")[0] == 2
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == before
    assert checkpoint.damage(newest(tmp_path / "run")) is None
    assert (tmp_path / "run" / checkpoint.LAST_WEIGHTS).exists()


def test_going_back_gives_up_what_came_after(quick_run: Run, tmp_path: Path) -> None:
    """Else `--resume auto` would go on with the try that was given up."""
    options = (*RANDOM, "--epochs", "3", "--output.keep_last", "9")
    assert quick_run(*options)[0] == 0
    three = str(checkpoint.step_folder(tmp_path / "run", 3))
    trainer = Trainer(parse_command_line([*settings_of(tmp_path / "run"), *options, "--resume", three]))
    trainer.progress.step = 4
    trainer.saver.save()
    steps = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")]
    assert steps == [2, 3, 4]


def test_a_checkpoint_of_another_run_does_not_mix_with_the_one_here(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "other")
    assert quick_run("--epochs", "1")[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    status, error = quick_run("--resume", str(newest(tmp_path / "other")))
    assert (status, error.count("\n")) == (2, 1)
    assert f"{tmp_path / 'run'} already holds another run" in error
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_shards_hold_tensors_and_run_nothing(tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple:
            return Path.write_text, (tmp_path / "proof", "it ran")

    given = {"model": {"a": torch.arange(6.0).view(2, 3)}, "optimizer": {"a": {"step": torch.tensor(2.0)}}}
    write_shards(tmp_path / "shards", given)
    found = read_shards(tmp_path / "shards", {"model": {"a": torch.zeros(2, 3)}, "ema": {"a": torch.zeros(2, 3)}})
    assert_same(found, {"model": given["model"]})
    assert_same(read_whole(tmp_path / "shards"), given["model"])
    for into in ({"model": {"a": torch.zeros(2, 4)}}, {"model": {"b": torch.zeros(2, 3)}}):
        with pytest.raises(InputError):
            read_shards(tmp_path / "shards", into)
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Program()))
    with pytest.raises(InputError, match="which no checkpoint needs"):
        read_whole(tmp_path / "shards")
    assert not (tmp_path / "proof").exists()


def test_an_export_that_cannot_be(quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert quick_run("--epochs", "1")[0] == 0
    last = newest(tmp_path / "run")
    capsys.readouterr()
    for arguments, message in (
        ([last, tmp_path / "out.pth"], "end the name in .safetensors"),
        ([tmp_path, tmp_path / "out.safetensors"], "is damaged (manifest.json is missing)"),
    ):
        assert export(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert export([str(last), str(tmp_path / "out.safetensors")]) == 0
    weights, left = load_file(tmp_path / "out.safetensors"), load_file(tmp_path / "run" / checkpoint.LAST_WEIGHTS)
    assert_same(weights, left)
