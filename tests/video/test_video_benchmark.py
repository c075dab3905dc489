"""The comparison with the frameworks' video backbones runs, and its competitors compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hvt_backbones as hvt
from benchmarks import competitors, measure, video

# windows of 8x7x7 on maps of 4x8x8 to 4x1x1: shrunk along time, shifted and padded along the sides
SMALL = {"small": {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 2]}}


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MODELS", SMALL)
    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype, *, kind: {"flops_per_s": 1e11, "side": 2048})


COMMAND = ["--sizes", "8x32x36", "--rounds", "2", "--warmup", "1"]


@pytest.mark.slow
def test_frameworks_are_compared(tmp_path: Path, capsys) -> None:
    out = tmp_path / "video.json"
    assert video.main([*COMMAND, "--models", "small", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["command"].split() == [
        *("python", "-m", "benchmarks.video"), *COMMAND, "--models", "small", "--out", str(out)
    ]  # fmt: skip
    assert [(row["image_size"], row["mode"]) for row in report["rows"]] == [
        ([8, 32, 36], "forward"),
        ([8, 32, 36], "backward"),
    ]
    forward, backward = report["rows"]
    assert backward["flops"] == 3 * forward["flops"]
    for row in report["rows"]:
        assert set(row["competitors"]) == {"hvt", "HVTBackbone", "mmaction2", "torchvision"}
        assert row["peer_best"] in ("mmaction2", "torchvision")
        assert row["missing"] == []
        for entry in row["competitors"].values():
            assert entry["error_to_hvt"] < 1e-4
            assert len(entry["samples_s"]) == 2
            assert entry["fraction_of_matmul_rate"] == pytest.approx(row["flops"] / entry["median_s"] / 1e11)
    assert report["machine"]["mmaction2"]
    printed = capsys.readouterr().out
    assert "of rate" in printed
    assert "left out" not in printed


def test_frameworks_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    for module in (competitors, video):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    out = tmp_path / "video.json"
    assert video.main([*COMMAND, "--models", "small", "--modes", "forward", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["competitors"]) == {"hvt", "torchvision"}
    assert row["missing"] == ["HVTBackbone", "mmaction2"]
    assert "left out, not installed: mmaction2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("clip", [(16, 112, 112), (18, 64, 96)], ids=str)
def test_competitors_are_equal_where_windows_shrink_and_shift(clip: tuple[int, int, int]) -> None:
    models, missing = video.build_competitors("small")
    assert not missing
    competitors.check_equal(models, torch.randn(1, 3, *clip), reference="hvt")
    with torch.no_grad():
        models["torchvision"].norm.bias[3] += 0.1
    with pytest.raises(AssertionError, match="not the function that hvt computes: {'torchvision'"):
        competitors.check_equal(models, torch.randn(1, 3, 8, 32, 32), reference="hvt")


def test_operations_are_those_of_the_paper() -> None:
    # Video Swin-T on 32x224x224: 88 G multiply-adds (arXiv:2106.13230, Table 1)
    model = hvt.create_backbone("video_swin_tiny", out_indices=(3,))
    flops, shapes = competitors.dry_run(model, (32, 224, 224))
    assert flops == pytest.approx(2 * 88e9, rel=0.01)
    assert shapes == [(768, 16, 7, 7)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "224x224"], "must be FRAMESxHEIGHTxWIDTH"),
        (["--sizes", "31x224x224"], "frames a multiple of 2"),
        (["--sizes", "0x224x224"], "must be FRAMESxHEIGHTxWIDTH"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys) -> None:
    assert video.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert printed.out == ""
