"""The configurations: complete, of the published size, and able to train and be evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from runner.config import open_config
from runner.parts import complete
from segmentation.zoo import SEGMENTATION
from tests import dense_configs as shared

METHODS = {"upernet": "8xb2-160k_ade20k-512x512", "fpn": "8xb2-80k_ade20k-512x512"}
PRETRAINED_22K = {
    "swin-b-p4-w7-in22k": "swin_base",
    "swin-l-p4-w7-in22k": "swin_large",
    "swinv2-b-w12-in22k": "swinv2_base_window12_192",
}
BACKBONES = {**shared.BACKBONES, **PRETRAINED_22K}


def test_every_method_has_every_backbone() -> None:
    names = {f"{method}_{key}_{run}" for method, run in METHODS.items() for key in shared.BACKBONES}
    names |= {f"upernet_{key}_8xb2-160k_ade20k-640x640" for key in PRETRAINED_22K}
    assert set(SEGMENTATION.rows) == names


def test_the_readme_has_the_tables() -> None:
    assert shared.readme_is_current(SEGMENTATION)


def flops_of(model: nn.Module, shape: tuple[int, int]) -> shared.Flops:
    """Without the auxiliary head, which only training uses."""
    maps, backbone = shared.count_backbone(model.backbone, shape)
    neck = shared.Flops(0)
    if model.with_neck:
        maps, neck = shared.count(model.neck, maps)
    _, head = shared.count(model.decode_head, maps)
    return shared.Flops(backbone.total + neck.total + head.total, backbone.attention, backbone.padding)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTATION.rows)
def test_is_as_large_as_published(name: str) -> None:
    cfg = open_config(name, {}, SEGMENTATION)
    key, crop = name.split("_")[1], cfg.model.data_preprocessor.size
    assert (cfg.model.backbone.name, cfg.model.test_cfg.crop_size) == (BACKBONES[key], crop)
    assert cfg.custom_hooks == [{"type": "HVTResumeHook"}]
    # whose checkpoints are the published ones
    assert (cfg.model.backbone.get("style") == "official") == key.startswith("pvt")
    assert cfg.model.backbone.pretrained == ("in22k" if key in PRETRAINED_22K else "in1k")
    assert name.endswith(f"{crop[0]}x{crop[1]}")
    model = shared.build(cfg)
    flops = {shape: flops_of(model, shape) for shape in {crop, shared.published_shape(SEGMENTATION.rows[name]) or crop}}
    shared.check_figures(SEGMENTATION.rows[name], shared.parameters(model), flops, crop)


def small(name: str, arguments: dict[str, Any], ade: Path, work_dir: Path) -> Config:
    cfg = shared.small_config(name, SEGMENTATION, arguments, work_dir)
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[part].dataset.data_root = str(ade)
    cfg.train_cfg.update(max_iters=1, val_interval=2)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("kind", shared.SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_is_evaluated(method: str, kind: str, ade: Path, tmp_path: Path) -> None:
    cfg = small(f"{method}_{kind}_{METHODS[method]}", shared.SMALL[kind], ade, tmp_path)
    metrics = shared.train_and_evaluate(cfg)
    assert 0.0 <= metrics["mIoU"] <= 100.0


@pytest.mark.slow
def test_windows_at_several_scales_with_mirror_images(ade: Path, tmp_path: Path) -> None:
    """Testing as the papers' "ms + flip" does, for the larger crop: as mmsegmentation's own tools put it together."""
    cfg = small("upernet_swin-b-p4-w7-in22k_8xb2-160k_ade20k-640x640", shared.WINDOWED, ade, tmp_path)
    complete(cfg)
    cfg.model.test_cfg.mode = "slide"
    shared.shrink(cfg.tta_pipeline)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = {**cfg.tta_model, "module": cfg.model}
    runner = Runner.from_cfg(cfg)
    windows = []
    runner.model.module.backbone.register_forward_pre_hook(lambda _, inputs: windows.append(tuple(inputs[0].shape[2:])))
    metrics = runner.test()
    assert 0.0 <= metrics["mIoU"] <= 100.0
    # at 40, 60, 80, 100, 120 and 140 pixels: one window up to the crop of 80, then 2 x 2, 2 x 2 and 3 x 3
    windows_of_one = [(40, 40), (60, 60), (80, 80)] + (4 + 4 + 9) * [(80, 80)]
    assert sorted(windows) == sorted(len(list(ade.glob("images/validation/*"))) * 2 * windows_of_one)
