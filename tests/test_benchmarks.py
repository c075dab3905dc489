"""The benchmarks: their measurements are right, their competitors are equal, their commands say what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvt_backbones as hvt
from benchmarks import competitors, dense, gpu_checks, measure, peers
from hvt_backbones.errors import WeightsError

from .conftest import ROOT

CPU = torch.device("cpu")
MIB = 2**20
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"


def mebibytes(count: int) -> torch.Tensor:
    return torch.ones(count * MIB // 4)


# ---- measure ----


def test_peak_memory_of_known_allocations() -> None:
    def build() -> measure.Work:
        weights, state = mebibytes(3), []

        def work() -> None:
            if not state:
                peak_of_the_first_call = mebibytes(64)
                state.append(mebibytes(2))
                del peak_of_the_first_call
            first = mebibytes(8)
            second = mebibytes(4)  # 3 + 2 + 8 + 4: the peak
            del first
            third = mebibytes(5)
            assert weights.numel() + second.numel() + third.numel()

        return work

    assert measure.peak_memory(build, CPU) == 17 * MIB


def test_peak_memory_sees_inside_operators_and_the_backward_pass() -> None:
    def build(keep: bool) -> measure.Work:
        inputs = mebibytes(1).requires_grad_()

        def work() -> None:
            with torch.set_grad_enabled(keep):
                result = inputs.sin().sin().sin().sin().sum()  # 4 results, of which autograd keeps 3 and the input
            if keep:
                result.backward()
                inputs.grad = None

        return work

    without = measure.peak_memory(lambda: build(False), CPU)
    assert 3 * MIB <= without < 3.1 * MIB  # the input, what an operator reads, what it writes
    # at the start of the backward pass: the input, three results that autograd keeps, and the first gradients
    assert 6 * MIB <= measure.peak_memory(lambda: build(True), CPU) < 7.1 * MIB


def test_interleave_gives_every_competitor_one_sample_a_round_in_changing_order() -> None:
    calls: list[str] = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = measure.interleave(works, measure.Clock(CPU), rounds=6, warmup=1, shortest=0.0)
    rounds = ["".join(calls[start : start + 3]) for start in range(3, len(calls), 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert {name: len(times) for name, times in samples.items()} == {"a": 6, "b": 6, "c": 6}


def test_short_work_is_called_several_times_a_sample() -> None:
    calls = []
    measure.interleave({"a": lambda: calls.append(1)}, measure.Clock(CPU), rounds=2, warmup=1, shortest=10.0)
    assert len(calls) == 1 + 2 * 200


def test_ratio_is_the_median_of_ratios_within_rounds() -> None:
    # the machine was three times slower in the second round: the ratio of medians would be 1.0
    ratio = measure.paired_ratio([1.0, 6.0, 2.0], [2.0, 12.0, 1.0])
    assert ratio == (0.5, 0.5, 1.25)
    assert measure.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_matmul_rate_is_counted_in_operations_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Clock, "seconds", lambda self, work, calls=1: 0.5)
    assert measure.matmul_rate(CPU, torch.float32, budget=0.0) == {"flops_per_s": 2 * 2048**3 / 0.5, "side": 2048}


# ---- peers ----


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(peers.MODELS, "pvt_v2_b0", peers.Peers("pvt_v2_b0", multiple=32))
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype, *, kind: {"flops_per_s": 1e11, "side": 2048})
    return "pvt_v2_b0"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_peers_writes_every_figure(small_model: str, dtype: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "peers.json"
    command = ["--models", small_model, "--image-size", "32", "--batch", "2", "--rounds", "2", "--warmup", "1"]
    assert peers.main([*command, "--dtype", dtype, "--attention", "sdpa", "--out", str(out)]) == 0

    report = json.loads(out.read_text())
    assert report["machine"]["threads"] == 1
    assert report["machine"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["arguments"]["dtype"] == dtype
    assert [row["mode"] for row in report["rows"]] == ["inference", "train"]
    for row in report["rows"]:
        assert set(row["competitors"]) == {"hvt", "hvt-sdpa", "timm", "timm-unfused"}
        assert row["timm_best"] in ("timm", "timm-unfused")
        assert row["competitors"][row["timm_best"]]["ratio_to_timm_best"] == 1.0
        for entry in row["competitors"].values():
            assert len(entry["samples_s"]) == 2
            assert entry["min_s"] <= entry["median_s"]
            assert entry["flops_per_s"] == pytest.approx(row["flops"] / entry["median_s"])
            assert entry["fraction_of_matmul_rate"] == pytest.approx(entry["flops_per_s"] / 1e11)
            assert entry["error_to_timm"] < 1e-4
    parameters = sum(p.numel() for p in peers.build_timm("pvt_v2_b0").parameters())
    for entry in report["rows"][1]["competitors"].values():
        assert entry["peak_training_bytes"] > 4 * 4 * parameters  # weights, gradients, two moments
    printed = capsys.readouterr().out
    assert "x timm best" in printed
    assert f"revision {report['revision']}" in printed


def test_a_failing_model_is_reported_and_leaves_the_other_rows(small_model: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(peers.MODELS, "swin_nowhere", peers.Peers("swin_nowhere", multiple=32))
    out = tmp_path / "peers.json"
    command = ["--models", "swin_nowhere", small_model, "--image-size", "32", "--batch", "1", "--rounds", "1"]
    assert peers.main([*command, "--modes", "inference", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert [row["model"] for row in report["rows"]] == [small_model]
    assert [failure.split(":")[0] for failure in report["failures"]] == ["swin_nowhere"]


def test_competitors_that_compute_something_else_are_refused(small_model: str) -> None:
    models = peers.build_competitors(small_model)
    images = torch.randn(1, 3, 32, 32)
    assert set(competitors.check_equal(models, images, reference="timm")) == set(models)
    with torch.no_grad():
        models["hvt"].head.bias[3] += 0.1
    with pytest.raises(AssertionError, match="not the function that timm computes: {'hvt'"):
        competitors.check_equal(models, images, reference="timm")


def test_fused_attention_is_switched_in_every_module(small_model: str) -> None:
    models = peers.build_competitors(small_model)
    flags = {
        name: {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
        for name, model in models.items()
        if name.startswith("timm")
    }
    assert flags == {"timm": {True}, "timm-unfused": {False}}


def test_flops_are_those_of_the_paper() -> None:
    # Swin-T at 224: 4.5 G multiply-adds (arXiv:2103.14030, Table 1)
    flops = peers.count_flops("swin_tiny", 224)
    assert flops["inference"] == pytest.approx(2 * 4.5e9, rel=0.01)
    assert flops["train"] == 3 * flops["inference"]


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.MODELS)
def test_competitors_of_every_model_are_equal(name: str) -> None:
    models = peers.build_competitors(name, ["sdpa"])
    assert ("torchvision" in models) == name.startswith("swin")
    size = peers.MODELS[name].image_size
    competitors.check_equal(models, torch.randn(1, 3, size, size), reference="timm")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "swin_tny"], "'swin_tny': did you mean swin_tiny"),
        (["--models", "swin_tiny", "--image-size", "200"], "multiple of 224"),
        (["--rounds", "0"], "whole number from 1"),
        (["--batch", "four"], "whole number from 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--tf32"], "--tf32 is for CUDA"),
        (["--out", "no/such/folder/peers.json"], "cannot be written"),
        (["--attention", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys) -> None:
    assert peers.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# ---- dense ----


def without_openmmlab(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (competitors, dense):
        monkeypatch.setattr(module, "find_spec", lambda name: None)


@pytest.fixture
def small_dense(monkeypatch: pytest.MonkeyPatch) -> str:
    arguments = {"patch_norm_eps": 1e-6, "sr_norm_eps": 1e-6}
    monkeypatch.setitem(
        dense.MODELS,
        "small",
        dense.Dense("pvt_v2_b0", arguments, {"mmdet": ("Any", {})}, "pvt_v2_b0"),
    )
    without_openmmlab(monkeypatch)
    return "small"


def test_dense_without_openmmlab(small_dense: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "dense.json"
    command = ["--models", small_dense, "--sizes", "32x64", "--rounds", "2", "--warmup", "1", "--out", str(out)]
    assert dense.main(command) == 0
    report = json.loads(out.read_text())
    assert report["command"].split() == ["python", "-m", "benchmarks.dense", *command]
    assert [(row["image_size"], row["mode"]) for row in report["rows"]] == [
        ([32, 64], "forward"),
        ([32, 64], "backward"),
    ]
    parameters = sum(p.numel() for p in hvt.create_backbone("pvt_v2_b0").parameters())
    for row, copies in zip(report["rows"], (1, 2), strict=True):  # weights, then gradients too
        assert set(row["competitors"]) == {"hvt", "timm"}
        assert row["peer_best"] == "timm"
        assert row["missing"] == ["HVTBackbone", "mmdet"]
        for entry in row["competitors"].values():
            assert len(entry["samples_s"]) == 2
            assert entry["error_to_hvt"] < 1e-4
            assert copies * 4 * parameters < entry["peak_bytes"] < (copies + 1.5) * 4 * parameters
    printed = capsys.readouterr().out
    assert "x peer best" in printed
    assert "left out, not installed: mmdet" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", dense.MODELS)
def test_dense_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_openmmlab(monkeypatch)
    size = dense.MODELS[name].checked_size((64, 96))
    models, _ = dense.build_competitors(name, size)
    assert ("timm" in models) != (name == "twins_svt_small")
    competitors.check_equal(models, torch.randn(1, 3, *size), reference="hvt")


def test_dense_reports_a_model_that_fails(small_dense: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(dense.MODELS, "small", dense.Dense("pvt_v2_b0", timm="pvt_v2_b1"))
    assert dense.main(["--models", small_dense, "--sizes", "32x32", "--rounds", "1"]) == 1
    assert "FAILED small 32x32: RuntimeError: Error(s) in loading" in capsys.readouterr().out


def test_dense_goes_on_after_weights_that_do_not_fit(small_dense: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def convert_state_dict(*arguments: Any, **options: Any) -> None:
        raise WeightsError("it has no place")

    monkeypatch.setattr(dense.hvt, "convert_state_dict", convert_state_dict)
    assert dense.main(["--models", small_dense, "--sizes", "32x32", "32x64", "--rounds", "1"]) == 1
    printed = capsys.readouterr().out
    assert all(f"FAILED small {size}: WeightsError: it has no place" in printed for size in ("32x32", "32x64"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "swin_tny"], "'swin_tny': did you mean swin_tiny"),
        (["--sizes", "800"], "must be HEIGHTxWIDTH"),
        (["--sizes", "800x1210"], "multiples of 32"),
        (["--sizes", "0x32"], "multiples of 32"),
        (["--device", "tpu"], "unknown device 'tpu'"),
    ],
)
def test_bad_input_of_dense(arguments: list[str], message: str, capsys) -> None:
    assert dense.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


# ---- the checks on an accelerator ----


def wrong_at_the_end(qkv: torch.Tensor, *arguments, **options) -> torch.Tensor:
    result = gpu_checks.IMPLEMENTATIONS["reference"].attend(qkv, *arguments, **options)
    return torch.cat([result[..., :-1], torch.empty_like(result[..., -1:])], dim=-1)


@pytest.fixture
def few_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "MAPS", {"odd": gpu_checks.MAPS["odd"]})


def test_gpu_checks_pass_on_the_cpu(few_maps: None, tmp_path: Path, capsys) -> None:
    out = tmp_path / "checks.json"
    assert gpu_checks.main(["--device", "cpu", "--groups", "attention", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["failed"] == 0
    assert len(report["checks"]) == len(gpu_checks.IMPLEMENTATIONS) * len(gpu_checks.FORMS) * 4
    assert all(0 < check["error"] < check["limit"] for check in report["checks"] if "float16" in check["name"])


def test_gpu_checks_notice_an_element_that_nobody_wrote(few_maps: None, monkeypatch, capsys) -> None:
    monkeypatch.setitem(
        gpu_checks.IMPLEMENTATIONS, "wrong", gpu_checks.IMPLEMENTATIONS["reference"]._replace(attend=wrong_at_the_end)
    )
    assert gpu_checks.main(["--device", "cpu", "--groups", "attention"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == len(gpu_checks.FORMS) * 4
    assert all("attention: wrong odd" in line and "output: error nan" in line for line in failed)


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda: {"fine": (0.0, 1.0), "bad": (float("nan"), 1.0)}, "bad: error nan"),
        (lambda: {"fine": (0.5, 1.0), "bad": (1.0, 1.0)}, "bad: error 1.00e+00"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["nan", "at_the_limit", "exception"],
)
def test_what_fails_a_check(run: Callable, text: str) -> None:
    outcome = gpu_checks.judge("group", "name", run)
    assert not outcome.passed
    assert text in str(outcome)


def test_a_family_that_is_wrong_on_the_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    families = gpu_checks._from_tests("families")
    run = lambda: gpu_checks._family(families.tiny("pvt_v2"), torch.randn(2, 3, 64, 64), "default", CPU)  # noqa: E731
    assert gpu_checks.judge("families", "pvt_v2", run).passed
    moved = nn.Module.to

    def spoil(module: nn.Module, *arguments, **options) -> nn.Module:
        module = moved(module, *arguments, **options)
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        return module

    monkeypatch.setattr(nn.Module, "to", spoil)
    assert not gpu_checks.judge("families", "pvt_v2", run).passed


# ---- gpu_check.sh ----


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PYTHON": sys.executable, "HVT_CHECK_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_script_is_valid_and_executable() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize("arguments", [(), ("",), ("a", "b")], ids=["none", "empty", "two"])
def test_script_without_an_output_folder(arguments: tuple[str, ...]) -> None:
    result = run_script(*arguments)
    assert result.returncode == 2
    assert result.stderr == "error: usage: benchmarks/gpu_check.sh OUT_DIR\n"


def test_script_output_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run_script(str(file))
    assert result.returncode == 2
    assert "is not a folder that can be written" in result.stderr


def test_script_with_an_unknown_part(tmp_path: Path) -> None:
    result = run_script(str(tmp_path), HVT_CHECK_PARTS="float8")
    assert result.returncode == 2
    assert "no part float8: choose from tests checks float32 bfloat16 dense video" in result.stderr


@pytest.mark.parametrize("patience", ["0", "1.5", "-1"])
def test_script_with_no_time(patience: str, tmp_path: Path) -> None:
    result = run_script(str(tmp_path), HVT_CHECK_PATIENCE=patience)
    assert result.returncode == 2
    assert result.stderr == f"error: HVT_CHECK_PATIENCE is {patience}: give a whole number from 1\n"


@pytest.mark.slow
def test_script_runs_checks_and_peers(tmp_path: Path) -> None:
    result = run_script(
        str(tmp_path / "out"),
        HVT_CHECK_PARTS="checks float32 dense video",
        HVT_CHECK_PEERS="--models pvt_v2_b2 --image-size 32 --batch 1 --rounds 1 --warmup 1 --modes inference",
        HVT_CHECK_DENSE="--models pvt_v2_b2 --sizes 32x32 --rounds 1 --warmup 1 --modes forward",
        HVT_CHECK_VIDEO="--sizes 4x32x32 --rounds 1 --warmup 1 --modes forward",
        HVT_CHECK_PATIENCE="10",  # other tests run beside it
        HVT_REFERENCE_DIR=str(tmp_path),  # no cases: they have a test of their own
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    parts = ("checks", "peers_float32", "dense", "video")
    assert [line.split()[:2] for line in summary] == [["passed", name] for name in parts]
    assert json.loads((tmp_path / "out" / "checks.json").read_text())["failed"] == 0
    assert json.loads((tmp_path / "out" / "peers_float32.json").read_text())["rows"]
    assert json.loads((tmp_path / "out" / "dense.json").read_text())["rows"]
    assert json.loads((tmp_path / "out" / "video.json").read_text())["rows"]
    assert json.loads((tmp_path / "out" / "doctor.json").read_text())["packages"]["timm"]


@pytest.mark.slow
def test_script_fails_when_a_part_fails(tmp_path: Path) -> None:
    result = run_script(
        str(tmp_path), HVT_CHECK_PARTS="float32", HVT_CHECK_PEERS="--models nothing", HVT_CHECK_PATIENCE="5"
    )
    assert result.returncode == 1
    assert (tmp_path / "summary.txt").read_text().startswith("FAILED  peers_float32: exit status 2")
