"""`python -m segmentation.demo`: a true ADE20K is drawn, and UPerNet learns from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset
from PIL import Image

from demos import segmentation as demo
from demos.ade import CLASSES, write_ade
from demos.segmentation import COLORS
from demos.training import PRETRAINED, SCRATCH, Goal, Training, verdict
from tests.dense_demos import check_pictures, quick_demo


def test_the_numbers_are_those_of_ade20k() -> None:
    names = ADE20KDataset.METAINFO["classes"]
    assert all(names[number - 1] == name for number, name in CLASSES.values())
    assert {name for _, name in CLASSES.values()} == set(COLORS)


def test_mmsegmentation_reads_the_layout(tmp_path: Path) -> None:
    folder = write_ade(tmp_path / "ade", train=12, val=1)
    data = ADE20KDataset(
        data_root=str(folder),
        data_prefix={"img_path": "images/training", "seg_map_path": "annotations/training"},
        pipeline=[{"type": "mmseg.LoadAnnotations", "reduce_zero_label": True}],
    )
    assert len(data) == 12
    seen: set[int] = set()
    for index in range(12):
        sample = data[index]
        with Image.open(sample["img_path"]) as picture:
            assert picture.size == sample["gt_seg_map"].shape[::-1]
        seen |= set(np.unique(sample["gt_seg_map"]).tolist())
    # label 0 of the files becomes 255, and every other one less
    assert seen == {number - 1 for number, _ in CLASSES.values()} | {255}


def training(start: str, value: float) -> Training:
    return Training(start=start, runner=None, history=[(1, {"mIoU": 0.0}), (2, {"mIoU": value})])


@pytest.mark.parametrize(
    ("pretrained", "scratch", "message"),
    [(0.8, 0.6, None), (0.7, 0.3, "below 0.75"), (0.8, 0.78, "from scratch"), (float("nan"), 0.3, "below 0.75")],
)
def test_the_verdict(pretrained: float, scratch: float, message: str | None) -> None:
    goals = [Goal(name="mIoU", key="mIoU", required=0.75, quick=0.2)]
    table, failures = verdict([training(PRETRAINED, pretrained), training(SCRATCH, scratch)], goals, False)
    assert f"{pretrained:.3f}" in table
    assert f"{scratch:.3f}" in table
    assert bool(failures) == (message is not None)
    assert message is None or any(message in failure for failure in failures)


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    status, printed = quick_demo(demo.main, tmp_path)
    assert status == 0, printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"pretrained"}
    check_pictures(tmp_path / "run")
