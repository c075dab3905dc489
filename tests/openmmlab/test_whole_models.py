"""Detectors and segmentors made with the frameworks' own backbones give the same results with ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint, save_checkpoint

from hvt_backbones.errors import InputError
from runner.parts import check_classes

from .models import assert_same_predictions, build, dense_maps, randomise

CASES = [
    *((method, family) for method in ("mask-rcnn", "cascade", "retinanet") for family in ("swin", "pvt_v2")),
    *((method, family) for method in ("upernet", "fpn") for family in ("swin", "twins_pcpvt", "twins_svt")),
]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_same_results(method: str, family: str, tmp_path: Path) -> None:
    theirs = randomise(build(method, family, ours=False))
    path = str(tmp_path / "theirs.pth")  # the type that MMEngine takes
    save_checkpoint({"meta": {}, "state_dict": theirs.state_dict()}, path)
    ours = build(method, family, ours=True)
    load_checkpoint(ours, path, strict=True)

    images = torch.randn(2, 3, 91, 123)
    assert_same_predictions(ours, theirs, images)

    images = images.double()
    for result, expected in zip(dense_maps(ours.double(), images), dense_maps(theirs.double(), images), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)


def test_classes_of_models_with_other_backbones_are_left_alone() -> None:
    """Some heads of other papers predict something else than the classes of the data."""
    data = {"classes": ("disc",)}
    check_classes(build("mask-rcnn", "swin", ours=False), data, "training")
    with pytest.raises(InputError, match="bbox_head.num_classes is 3, the training data has the class disc"):
        check_classes(build("mask-rcnn", "swin", ours=True), data, "training")
