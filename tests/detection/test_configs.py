"""The configurations: complete, of the published size, and able to train and be evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from detection.zoo import DETECTION
from runner.config import open_config
from tests import dense_configs as shared
from tests.dense_runs import CLASSES

METHODS = {
    "mask-rcnn": ("fpn_1x_coco", "fpn_ms-crop-3x_coco"),
    "cascade-mask-rcnn": ("fpn_ms-crop-3x_coco",),
    "retinanet": ("fpn_1x_coco",),
}
SHAPE = (800, 1280)
PROPOSALS, MASKS = 1000, 100  # for which papers count the second stage


def test_every_method_has_every_backbone() -> None:
    names = {f"{method}_{key}_{run}" for method, runs in METHODS.items() for run in runs for key in shared.BACKBONES}
    assert set(DETECTION.rows) == names


def test_the_readme_has_the_tables() -> None:
    assert shared.readme_is_current(DETECTION)


_heads: dict[object, shared.Flops] = {}


def flops_of(model: nn.Module) -> shared.Flops:
    maps, backbone = shared.count_backbone(model.backbone, SHAPE)
    maps, neck = shared.count(model.neck, maps)
    # the heads do not see which backbone there is
    if (kind := type(model).__name__) not in _heads:
        _heads[kind] = shared.Flops(sum(part.total for part in heads(model, maps)))
    return shared.Flops(backbone.total + neck.total + _heads[kind].total, backbone.attention, backbone.padding)


def heads(model: nn.Module, maps: tuple[torch.Tensor, ...]) -> Iterator[shared.Flops]:
    if not hasattr(model, "roi_head"):
        yield shared.count(model.bbox_head, maps)[1]
        return
    yield shared.count(model.rpn_head, maps)[1]
    for head, number, side in ((model.roi_head.bbox_head, PROPOSALS, 7), (model.roi_head.mask_head, MASKS, 14)):
        for stage in head if isinstance(head, nn.ModuleList) else [head]:
            yield shared.count(stage, torch.empty(number, 256, side, side, device="meta"))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION.rows)
def test_is_as_large_as_published(name: str) -> None:
    cfg = open_config(name, {}, DETECTION)
    assert cfg.custom_hooks == [{"type": "HVTResumeHook"}]
    token = name.split("_")[1]
    # their checkpoints are the published ones; mmdetection has none of Twins
    assert (cfg.model.backbone.get("style") == "official") == token.startswith(("pvt", "twins"))
    assert cfg.model.backbone.name == shared.BACKBONES[token]
    model = shared.build(cfg)
    shared.check_figures(DETECTION.rows[name], shared.parameters(model), {SHAPE: flops_of(model)}, SHAPE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", shared.SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_is_evaluated(method: str, kind: str, coco: Path, tmp_path: Path) -> None:
    name = f"{method}_{kind}_{METHODS[method][-1]}"
    cfg = shared.small_config(name, DETECTION, shared.SMALL[kind], tmp_path)
    cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg).score_thr = 0.0
    for name in ("train_dataloader", "val_dataloader"):
        cfg[name].dataset.update(data_root=str(coco), metainfo={"classes": CLASSES})
    cfg.val_evaluator.ann_file = str(coco / "annotations" / "instances_val2017.json")
    cfg.train_dataloader.dataset.indices = 2
    cfg.train_cfg.update(max_epochs=1, val_interval=2)
    metrics = shared.train_and_evaluate(cfg)
    assert metrics["coco/bbox_mAP"] >= 0.0
    assert ("coco/segm_mAP" in metrics) == (method != "retinanet")
