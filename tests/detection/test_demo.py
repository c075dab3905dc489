"""`python -m detection.demo`: a true COCO is drawn, and Mask R-CNN learns from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor

from classification import train
from demos import detection as demo
from demos.coco import CROWD_EVERY, EMPTY_EVERY, run_lengths, write_coco
from hvt_backbones.openmmlab import HVTBackbone
from runner.checkpoints import read_checkpoint
from tests.dense_demos import check_pictures, quick_demo


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", train=EMPTY_EVERY, val=2)


def test_pycocotools_reads_every_kind_of_annotation(drawn: Path) -> None:
    coco = COCO(str(drawn / "annotations" / "instances_train2017.json"))
    kinds = set()
    for annotation in coco.loadAnns(coco.getAnnIds()):
        polygon = isinstance(annotation["segmentation"], list)
        kinds.add("crowd" if annotation["iscrowd"] else "polygon" if polygon else "run lengths")
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
        # a polygon passes between the pixels that the mask counts as a whole
        assert box == pytest.approx(annotation["bbox"], abs=1.01 if polygon else 0)
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.25 if polygon else 0)
    assert kinds == {"polygon", "run lengths", "crowd"}
    crowds = coco.loadAnns(coco.getAnnIds(iscrowd=True))
    assert len(crowds) == EMPTY_EVERY // CROWD_EVERY
    assert coco.getAnnIds(imgIds=[EMPTY_EVERY]) == [], "the picture without objects"
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(drawn / "train2017" / image["file_name"]) as picture:
            assert (picture.width, picture.height) == (image["width"], image["height"])


def test_polygons_and_run_lengths_outline_what_is_painted(drawn: Path) -> None:
    """Inside and outside of an annotation differ in colour, so that neither is mirrored or shifted."""
    coco = COCO(str(drawn / "annotations" / "instances_train2017.json"))
    contrasts = []
    for annotation in coco.loadAnns(coco.getAnnIds(iscrowd=False)):
        name = coco.loadImgs(annotation["image_id"])[0]["file_name"]
        picture = np.asarray(Image.open(drawn / "train2017" / name), float)
        mask = coco.annToMask(annotation).astype(bool)
        around = np.zeros_like(mask)
        left, top, width, height = annotation["bbox"]
        around[max(0, top - 3) : top + height + 3, max(0, left - 3) : left + width + 3] = True
        contrasts.append(np.abs(picture[mask].mean(0) - picture[around & ~mask].mean(0)).sum())
    assert np.median(contrasts) > 60


def test_run_lengths_begin_outside_and_go_down_the_columns() -> None:
    assert run_lengths(np.array([[1, 0], [1, 1]], bool)) == [0, 2, 1, 1]
    assert run_lengths(np.array([[0, 0], [1, 0]], bool)) == [1, 1, 2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, *quick_demo(demo.main, folder)


@pytest.mark.slow
def test_it_learns(quick: tuple[Path, int, str]) -> None:
    folder, status, printed = quick
    assert status == 0, printed
    assert "bbox AP50" in printed
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert set(metrics) == {"pretrained"}
    check_pictures(folder / "run")
    saved = read_checkpoint(next((folder / "run" / "pretrained").glob("epoch_*.pth")))
    assert any(key.startswith("backbone.") for key in saved["state_dict"])


@pytest.mark.slow
def test_a_broken_backbone_does_not(quick: tuple[Path, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, things appear half a picture beside where they are."""
    forward = HVTBackbone.forward

    def beside(backbone: HVTBackbone, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.roll(one.shape[-1] // 2, -1) for one in forward(backbone, images))

    monkeypatch.setattr(train, "main", lambda options: 0)
    monkeypatch.setattr(HVTBackbone, "forward", beside)
    status, printed = quick_demo(demo.main, quick[0])
    assert status == 1, printed
    assert re.search(r"bbox AP50 0\.\d+ is below", printed)
    assert re.search(r"segm AP50 0\.\d+ is below", printed)
