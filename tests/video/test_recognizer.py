"""Recognizers of mmaction2 with its own Video Swin give the same scores with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import nn

import hvt_backbones as hvt
import hvt_backbones.openmmlab
from runner.patches import import_framework
from tests.families import randomise

import_framework("mmaction")

SIZES = {"depths": [2, 1, 2, 1], "num_heads": [1, 2, 4, 4]}
WINDOW = (2, 4, 4)
THEIRS = {
    "type": "SwinTransformer3D", "arch": {"embed_dims": 8, **SIZES}, "pretrained2d": False, "patch_size": (2, 4, 4),
    "window_size": WINDOW,
}  # fmt: skip
OURS = {"type": "HVTBackbone", "name": "video_swin_tiny", "embed_dim": 8, "window_size": WINDOW, **SIZES}


def recognizer(backbone: dict[str, Any], classes: int = 6) -> nn.Module:
    init_default_scope("mmaction")
    head = {"type": "I3DHead", "in_channels": 64, "num_classes": classes, "spatial_type": "avg", "dropout_ratio": 0.5}
    preprocessor = {"type": "ActionDataPreprocessor", "mean": [0.0], "std": [1.0], "format_shape": "NCTHW"}
    model = {"type": "Recognizer3D", "backbone": backbone, "cls_head": head, "data_preprocessor": preprocessor}
    return MODELS.build(model).eval()


def scores(model: nn.Module, clips: torch.Tensor) -> torch.Tensor:
    features, _ = model.extract_feat(clips[:, None])
    return model.cls_head(features).softmax(-1)


@pytest.mark.parametrize("size", [(8, 64, 64), (5, 41, 70)], ids=str)
def test_same_scores(size: tuple[int, ...], tmp_path: Path) -> None:
    theirs = randomise(recognizer(THEIRS))
    path = str(tmp_path / "theirs.pth")
    save_checkpoint({"meta": {}, "state_dict": theirs.state_dict()}, path)
    ours = recognizer(OURS)
    load_checkpoint(ours, path, strict=True)
    clips = torch.randn(2, 3, *size)
    torch.testing.assert_close(scores(ours, clips), scores(theirs, clips), rtol=1e-5, atol=1e-6)
    found, expected = (scores(model.double(), clips.double()) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_the_authors_checkpoint_loads_as_it_is(tmp_path: Path) -> None:
    ours = randomise(recognizer(OURS))
    model = hvt.Classifier(ours.backbone.model, 6)
    model.head.load_state_dict(ours.cls_head.fc_cls.state_dict())
    official = hvt.convert_state_dict(model.state_dict(), to="official", window_size=WINDOW)
    assert {"backbone.norm.weight", "cls_head.fc_cls.bias"} <= official.keys()
    path = str(tmp_path / "official.pth")
    save_checkpoint({"meta": {}, "state_dict": official}, path)
    loaded = recognizer(OURS)
    load_checkpoint(loaded, path, strict=True)
    clips = torch.randn(1, 3, 8, 64, 64)
    torch.testing.assert_close(scores(loaded, clips), scores(ours, clips), rtol=0, atol=0)


def test_several_stages_are_a_tuple() -> None:
    theirs = randomise(recognizer({**THEIRS, "out_indices": (1, 3)}).backbone).double()
    ours = recognizer({**OURS, "out_indices": (1, 3)}).backbone.double()
    ours.load_state_dict(theirs.state_dict())
    clips = torch.randn(1, 3, 6, 64, 40, dtype=torch.float64)
    found, expected = ours(clips), theirs(clips)
    assert isinstance(found, tuple)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_an_image_model_is_inflated(tmp_path: Path) -> None:
    images = randomise(hvt.create_classifier("swin_tiny", embed_dim=8, window_size=4, num_classes=3, **SIZES))
    torch.save(hvt.convert_state_dict(images.state_dict(), to="mmpretrain"), tmp_path / "images.pth")
    model = recognizer({**OURS, "pretrained": str(tmp_path / "images.pth")})
    model.init_weights()
    expected = hvt.inflate(images.state_dict(), window_size=WINDOW)
    state = model.backbone.model.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in state)
