"""Diagnoses during a run: they change nothing, they warn in time, and they show what SwinV2's Figure 1 shows."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from classification.checkpoint import files as checkpoint
from classification.objective import Classification
from classification.reporting.diagnosis import StepDiagnosis
from classification.train import main
from hvt_backbones import create_classifier
from hvt_backbones.cli import main as hvt
from hvt_backbones.diagnose import diagnose

from .saved_runs import RANDOM, Run, assert_same, learned, settings_of


def test_a_run_is_the_same_with_diagnoses_and_without(quick_run: Run, tmp_path: Path) -> None:
    """Random numbers, weights, their average, figures and checkpoints; also of a run that is resumed."""
    settings = (*RANDOM, "--output.keep_last", "9")
    quick_run(*settings)
    assert quick_run(*settings, "--output-dir", str(tmp_path / "on"), "--output.diagnose_steps", "1")[0] == 0
    assert_same(learned(tmp_path / "run"), learned(tmp_path / "on"))
    first, *later = checkpoint.list_checkpoints(tmp_path / "on")
    assert checkpoint.step_of(first) == 2  # in the middle of an epoch
    for path in later:
        shutil.rmtree(path)
    resumed = ("--resume", "auto", "--output.diagnose_steps", "2")
    assert quick_run(*settings, "--output-dir", str(tmp_path / "on"), *resumed)[0] == 0
    assert_same(learned(tmp_path / "run"), learned(tmp_path / "on"))


def test_the_figures_go_to_the_terminal_and_to_tensorboard(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*settings_of(tmp_path / "run"), "--output.diagnose_steps", "3", "--epochs", "2"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "variance" in line]
    assert [re.match(r"step (\d+): variance up to", line)[1] for line in lines] == ["1", "3", "6"]
    events = EventAccumulator(str(tmp_path / "run" / checkpoint.TENSORBOARD)).Reload()
    for figure in ("variance", "entropy", "logit", "gradient"):
        for block in ("stages.0.blocks.0", "stages.1.blocks.0"):
            points = events.Scalars(f"{figure}/{block}")
            assert [point.step for point in points] == [1, 3, 6]
            assert all(point.value > 0 for point in points)
    largest = max(events.Scalars(f"variance/stages.{stage}.blocks.0")[-1].value for stage in (0, 1))
    assert f"step 6: variance up to {largest:.3g} (" in lines[-1]


def test_a_step_has_the_figures_of_hvt_diagnose_and_its_own_gradients(capsys: pytest.CaptureFixture) -> None:
    model = create_classifier("swin_tiny", num_classes=3, embed_dim=16, depths=(1, 2), num_heads=(1, 2), window_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, classes, told = torch.randn(20, 3, 32, 32), torch.arange(20) % 3, {}
    events = SimpleNamespace(add=lambda step, **values: told.update({step: values}))
    learner = SimpleNamespace(objective=Classification(), model=model.train(), raw_optimizer=optimizer)
    diagnosis = StepDiagnosis(2, Accelerator(cpu=True), learner, events)
    expected = diagnose(model, [(images[:16], classes[:16])])
    for step in range(4, 8):
        with diagnosis.during(step, images):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model.eval()(images[:16]), classes[:16]).backward()
            optimizer.step()
    assert list(told) == [4, 6]
    for block in expected:
        for figure, value in (("variance", block.variance), ("entropy", block.entropy), ("logit", block.logit)):
            assert told[4][f"{figure}__{block.block}"] == pytest.approx(value, rel=1e-6)
        assert told[4][f"gradient__{block.block}"] == pytest.approx(block.grad_norm, rel=1e-4)
    assert not optimizer._optimizer_step_pre_hooks
    assert "warning" not in capsys.readouterr().out


def test_each_growth_is_warned_of_once(capsys: pytest.CaptureFixture) -> None:
    model = create_classifier("swin_tiny", num_classes=3, embed_dim=16, depths=(1,), num_heads=(1,), window_size=4)
    learner = SimpleNamespace(
        objective=Classification(), model=model, raw_optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    diagnosis = StepDiagnosis(1, Accelerator(cpu=True), learner, SimpleNamespace(add=lambda *_, **__: None))
    images, warned = torch.randn(4, 3, 32, 32), []
    # the main branch in front of the block; its variance is the square
    for step, deviation in enumerate([1, 8, 20, 40, 1, 80, 100, math.nan]):
        model.backbone.stages[0].downsample.norm.weight.data.fill_(deviation)
        with diagnosis.during(step, images):
            pass
        warned += re.findall(r"warning: step (\d+): variance", capsys.readouterr().out)
    assert warned == ["2", "5", "7"]


def test_a_blow_up_is_warned_of_before_it_happens(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = [*settings_of(tmp_path / "run"), "--optimizer.name", "sgd", "--output.diagnose_steps", "2"]
    assert main([*settings, "--lr", "0.01", "--epochs", "3"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main([*settings, "--lr", "30", "--epochs", "10", "--overwrite", "--optimizer.clip_grad", "null"]) == 1
    said = capsys.readouterr()
    assert "training diverged" in said.err
    lines = said.out.splitlines()
    warning = next(i for i, line in enumerate(lines) if line.startswith("warning: step"))
    skipped = next(i for i, line in enumerate(lines) if "step skipped" in line)
    assert warning < skipped
    assert re.search(r"(variance|logit) \S+ in stages\.\d\.blocks\.0 \(limit 100\)", lines[warning])
    assert lines[warning].endswith("the run may blow up; lower optimizer.lr or optimizer.clip_grad")


@pytest.mark.slow
def test_v1_grows_with_depth_and_v2_does_not(digits: Path, tmp_path: Path) -> None:
    """Figure 1 of SwinV2 (arXiv:2111.09883) on two models of one shape, trained alike on the digits."""
    variances = {}
    shape = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2, 6, 2], "num_heads": [1, 2, 4, 8]}
    for name in ("swin_tiny", "swinv2_tiny_window8"):
        run = tmp_path / name
        status = main(
            ["digits", "--model.name", name, "--model.overrides", json.dumps(shape | {"drop_path_rate": 0.0}),
             "--data-dir", str(digits), "--output-dir", str(run), "--epochs", "2", "--lr", "3e-3",
             "--schedule.warmup_epochs", "0", "--train.ema_decay", "0", "--augmentation.auto_augment", "null",
             "--data.workers", "0", "--device", "cpu"]
        )  # fmt: skip
        assert status == 0
        assert json.loads((run / checkpoint.METRICS).read_text())["best"]["top1"] > 80
        output = tmp_path / f"{name}.png"
        weights = str(run / checkpoint.LAST_WEIGHTS)
        assert hvt(["diagnose", weights, "--data", str(digits / "val"), "--output", str(output)]) == 0
        blocks = json.loads(output.with_suffix(".json").read_text())["blocks"]
        variances[name] = [block["variance"] for block in blocks]
        print(name, [round(variance, 3) for variance in variances[name]])
    v1, v2 = variances["swin_tiny"], variances["swinv2_tiny_window8"]
    assert v1[-1] > 4 * v1[0]
    assert v1[9] > 2 * v1[4]  # the six blocks of the third stage
    assert max(v2) < 1.5 * min(v2)
