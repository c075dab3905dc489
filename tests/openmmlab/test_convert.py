"""What `HVTBackbone` saves goes back into the frameworks' own models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint

import hvt_backbones as hvt
from hvt_backbones.cli import main
from hvt_backbones.weights.files import read_weights

from .models import BACKBONES, assert_same_predictions, build, randomise


def save(model: torch.nn.Module, path: Path) -> str:
    save_checkpoint({"meta": {"epoch": 1}, "state_dict": model.state_dict()}, str(path))
    return str(path)


@pytest.mark.parametrize("family", BACKBONES)
def test_a_whole_model_and_back(family: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    method = "mask-rcnn" if family in ("swin", "pvt_v2") else "upernet"
    ours = randomise(build(method, family, ours=True))
    source, theirs_path, ours_path = save(ours, tmp_path / "ours.pth"), tmp_path / "theirs.pth", tmp_path / "back.pth"
    assert main(["convert", source, str(theirs_path), "--to", "mmdet"]) == 0
    assert f"hvt layout of {family}" in capsys.readouterr().out
    theirs = build(method, family, ours=False)
    load_checkpoint(theirs, str(theirs_path), strict=True)
    images = torch.randn(1, 3, 75, 93)
    assert_same_predictions(theirs, ours, images)

    assert main(["convert", str(theirs_path), str(ours_path), "--to", "hvt"]) == 0
    back = build(method, family, ours=True)
    load_checkpoint(back, str(ours_path), strict=True)
    torch.testing.assert_close(back.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_the_backbone_alone(tmp_path: Path) -> None:
    ours = randomise(build("fpn", "swin", ours=True))
    source, output = save(ours, tmp_path / "ours.pth"), tmp_path / "backbone.safetensors"
    assert main(["convert", source, str(output), "--to", "hvt", "--backbone-only"]) == 0
    assert read_weights(output).tensors.keys() == ours.backbone.model.state_dict().keys()


@pytest.mark.parametrize("of_mmengine", [True, False])
def test_the_classes_stay(of_mmengine: bool, tmp_path: Path) -> None:
    classes, palette = ("disc", "box"), [[220, 40, 40], [40, 60, 220]]
    named = {"dataset_meta": {"classes": classes, "palette": palette, "weights": np.ones(2)}}
    meta = named if of_mmengine else {"CLASSES": classes, "PALETTE": palette}
    state = build("fpn", "swin", ours=True).state_dict()
    save_checkpoint({"meta": {"epoch": 1, **meta}, "state_dict": state}, str(tmp_path / "ours.pth"))
    for output in ("theirs.pth", "theirs.safetensors"):
        assert main(["convert", str(tmp_path / "ours.pth"), str(tmp_path / output), "--to", "mmdet"]) == 0
    written = torch.load(tmp_path / "theirs.pth", weights_only=True)
    assert written["meta"] == {"dataset_meta": {"classes": classes, "palette": palette}}
    assert read_weights(tmp_path / "theirs.safetensors").metadata == {}


def test_the_model_of_a_whole_model_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backbone = hvt.create_backbone("swin_tiny")
    state = {f"backbone.model.{key}": tensor for key, tensor in backbone.state_dict().items()}
    torch.save({"state_dict": {**state, "rpn_head.weight": torch.ones(2)}}, tmp_path / "ours.pth")
    source, output = str(tmp_path / "ours.pth"), str(tmp_path / "theirs.pth")
    assert main(["convert", source, output, "--to", "mmdet", "--model", "swin_small"]) == 2
    assert "depths (2, 2, 18, 2)" in capsys.readouterr().err
    assert main(["convert", source, output, "--to", "mmdet", "--model", "swin_tiny"]) == 0
    written = read_weights(output).tensors
    assert torch.equal(written["rpn_head.weight"], torch.ones(2))
    assert "backbone.stages.3.blocks.1.attn.w_msa.relative_position_index" in written
