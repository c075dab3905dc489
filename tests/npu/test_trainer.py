"""The trainer on the stand-in NPU: what it learns, leaves and resumes, alone and as two processes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from classification.benchmark import measure
from classification.checkpoint import files as checkpoint
from classification.trainer import Trainer
from classification.validate import main as validate
from tests.classification.conftest import QUICK
from tests.classification.test_trainer_run import FAMILIES
from tests.npu.standin_environment import ROOT, standin_environment
from tests.npu.watched_trainer import train

# Adam's usual eps would make whole steps out of gradients that are rounding alone, which differs between devices
SETTINGS = (*QUICK, "--optimizer.eps", "1e-5")
NPU = ("digits", *SETTINGS, "--device", "npu", "--train.amp", "fp32")


def losses(folder: Path) -> list[float]:
    return [float(row["train_loss"]) for row in csv.DictReader((folder / checkpoint.LOG).open())]


def run(data: Path, folder: Path, *options: str) -> Path:
    assert train([*NPU, "--data-dir", str(data), "--output-dir", str(folder), *options]) == 0
    return folder


@pytest.mark.slow
def test_it_trains_as_on_the_cpu(small_data: Path, tmp_path: Path) -> None:
    options = ("--epochs", "3", "--train.ema_decay", "0.9", "--model.overrides.drop_path_rate", "0.0")
    options += ("--augmentation.auto_augment", "null")
    here = run(small_data, tmp_path / "npu", *options)
    from classification.train import main

    arguments = ["digits", *SETTINGS, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "cpu"), *options]
    assert main(arguments) == 0
    assert losses(here) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)
    for name in (checkpoint.BEST_WEIGHTS, checkpoint.LAST_WEIGHTS):
        weights, expected = load_file(here / name), load_file(tmp_path / "cpu" / name)
        assert all(torch.allclose(weights[key], expected[key], atol=1e-3) for key in expected)


@pytest.mark.slow
@pytest.mark.parametrize("class_name", FAMILIES)
def test_it_trains_and_validates(
    class_name: str, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name, overrides = FAMILIES[class_name]
    given = json.dumps(overrides | {"depths": [1, 1], "drop_path_rate": 0.2})
    mixes = ("--augmentation.mixup", "0.8", "--augmentation.cutmix", "1.0", "--augmentation.random_erasing", "0.5")
    options = ("--model.name", name, "--model.overrides", given, "--model.max_logits", "500", "--train.amp", "bf16")
    folder = run(small_data, tmp_path / "run", *options, *mixes)
    capsys.readouterr()
    assert validate([str(folder), "--data-dir", str(small_data), "--device", "npu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    metrics = json.loads((folder / checkpoint.METRICS).read_text())
    assert (report["device"], report["images"]) == ("npu", 6)
    assert metrics["best"]["val_images"] == 6


@pytest.mark.slow
def test_it_paints_as_on_the_cpu(small_data: Path, tmp_path: Path) -> None:
    options = ("--train.task", "simmim", "--simmim.mask_patch_size", "8", "--simmim.norm_target", "9")
    here = run(small_data, tmp_path / "npu", *options)
    from classification.train import main

    arguments = ["digits", *SETTINGS, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "cpu"), *options]
    assert main(arguments) == 0
    assert losses(here) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


@pytest.mark.slow
def test_it_resumes_in_the_middle_of_an_epoch(small_data: Path, tmp_path: Path) -> None:
    # stochastic depth and mixup draw from the device's and the host's generators
    options = ("--epochs", "3", "--output.save_steps", "2", "--model.overrides.drop_path_rate", "0.3")
    options += ("--augmentation.mixup", "0.8", "--train.ema_decay", "0.9", "--output.keep_last", "9")
    whole = run(small_data, tmp_path / "whole", *options)
    for path in checkpoint.list_checkpoints(whole)[2:]:  # what a run killed after its second checkpoint leaves
        path.rename(tmp_path / path.name)
    expected = load_file(whole / checkpoint.LAST_WEIGHTS)
    run(small_data, whole, *options, "--resume", "auto")
    weights = load_file(whole / checkpoint.LAST_WEIGHTS)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    state = torch.load(checkpoint.list_checkpoints(whole)[0] / "rank_00000.pt", weights_only=True)
    assert state["device"].dtype == torch.uint8


@pytest.mark.slow
def test_fp16_scales_the_loss(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run(small_data, tmp_path / "run", "--train.amp", "fp16", "--epochs", "1")
    assert "precision fp16" in capsys.readouterr().out
    state = checkpoint.load_state(checkpoint.list_checkpoints(folder)[-1])
    assert state["scaler"]["scale"] >= 1.0
    assert all(tensor.isfinite().all() for tensor in load_file(folder / checkpoint.LAST_WEIGHTS).values())
    moments = state["optimizer"]["state"]
    assert all(values["step"] >= 1 for values in moments.values())  # not each step overflowed
    assert not state["optimizer"]["param_groups"][0]["fused"]


@pytest.mark.slow
def test_performance_mode(small_data: Path, tmp_path: Path) -> None:
    from classification.command_line import parse_command_line

    options = ("--output-dir", str(tmp_path / "run"), "--benchmark-steps", "2")
    trainer = Trainer(parse_command_line([*NPU, "--data-dir", str(small_data), *options]))
    results = measure(trainer)
    assert results.keys() == {"synthetic", "real"}
    assert all(figures["ms_per_step"] > 0 and figures["peak_memory_gib"] > 0 for figures in results.values())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "settings"),
    {
        "ddp": (),
        "fsdp2": ("--parallel.mode", "fsdp2"),
        "fsdp2, offloaded": ("--parallel.mode", "fsdp2", "--parallel.cpu_offload", "true", "--output.sharded", "true"),
    }.items(),
)
def test_two_processes_train_as_one(mode: str, settings: tuple[str, ...], small_data: Path, tmp_path: Path) -> None:
    options = ("--epochs", "3", "--model.overrides.drop_path_rate", "0.0", "--augmentation.auto_augment", "null")
    options += ("--train.ema_decay", "0.9", "--optimizer.clip_grad", "1")
    one = run(small_data, tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*NPU, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "two"), *options, *settings]

    def two(*more: str) -> str:
        result = subprocess.run(
            [*command, str(Path(__file__).with_name("watched_trainer.py")), *arguments, "--batch-size", "2", *more],
            cwd=ROOT, env=standin_environment(), capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-6000:]
        assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)
        return result.stdout

    assert f"on 2 x npu, {mode.partition(',')[0]}" in two()
    rows = list(csv.DictReader((tmp_path / "two" / checkpoint.LOG).open()))
    assert all(row["val_images"] == "6" for row in rows)
    if "offloaded" in mode:  # once more, from the checkpoint before the last
        checkpoint.list_checkpoints(tmp_path / "two")[-1].rename(tmp_path / "the last one")
        again = two("--resume", "auto")
        assert "epoch 3/3" in again
        assert "epoch 1/3" not in again
