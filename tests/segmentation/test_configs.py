"""The configurations: complete, of the published size, and able to train and be evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from tests import dense_configs as shared
from tests.dense_runs import ROOT

FOLDER = ROOT / "segmentation"
CONFIGS = shared.configs(FOLDER / "configs")
ROWS = {row.config: row for row in shared.rows(FOLDER / "README.md")}
METHODS = {"upernet": "8xb2-160k_ade20k-512x512", "fpn": "8xb2-80k_ade20k-512x512"}
PRETRAINED_22K = {
    "swin-b-p4-w7-in22k": "swin_base",
    "swin-l-p4-w7-in22k": "swin_large",
    "swinv2-b-w12-in22k": "swinv2_base_window12_192",
}
BACKBONES = {**shared.BACKBONES, **PRETRAINED_22K}


def test_every_method_has_every_backbone() -> None:
    stems = {f"{method}_{key}_{run}" for method, run in METHODS.items() for key in shared.BACKBONES}
    stems |= {f"upernet_{key}_8xb2-160k_ade20k-640x640" for key in PRETRAINED_22K}
    assert {path.stem for path in CONFIGS} == stems


def test_the_readme_lists_every_configuration() -> None:
    assert sorted(ROWS) == CONFIGS


def flops_of(model: nn.Module, shape: tuple[int, int]) -> shared.Flops:
    """Without the auxiliary head, which only training uses."""
    maps, backbone = shared.count_backbone(model.backbone, shape)
    neck = shared.Flops(0)
    if model.with_neck:
        maps, neck = shared.count(model.neck, maps)
    _, head = shared.count(model.decode_head, maps)
    return shared.Flops(backbone.total + neck.total + head.total, backbone.attention, backbone.padding)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_as_large_as_published(path: Path) -> None:
    cfg = Config.fromfile(path)
    key, crop = path.stem.split("_")[1], cfg.model.data_preprocessor.size
    assert (cfg.model.backbone.name, cfg.model.test_cfg.crop_size) == (BACKBONES[key], crop)
    assert cfg.custom_hooks == [{"type": "HVTResumeHook"}]
    # whose checkpoints are the published ones
    assert (cfg.model.backbone.get("style") == "official") == (path.parent.name == "pvt_v2")
    assert cfg.model.backbone.pretrained == ("in22k" if key in PRETRAINED_22K else "in1k")
    assert path.stem.endswith(f"{crop[0]}x{crop[1]}")
    model, row = shared.build(cfg), ROWS[path]
    shapes = {crop, row.published_flops.shape or crop} if row.published_flops else {crop}
    flops = {shape: flops_of(model, shape) for shape in shapes}
    shared.check_figures(row, shared.parameters(model), flops, crop)


def small(path: Path, kind: str, ade: Path, work_dir: Path) -> Config:
    channels, arguments = shared.SMALL[kind]
    cfg = shared.small_config(path, arguments, work_dir)
    if "neck" in cfg.model:
        cfg.model.neck.in_channels = channels
    else:
        cfg.model.decode_head.in_channels = channels
        cfg.model.auxiliary_head.in_channels = channels[2]
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[name].dataset.data_root = str(ade)
    cfg.train_cfg.update(max_iters=1, val_interval=2)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("kind", shared.SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_trains_and_is_evaluated(method: str, kind: str, ade: Path, tmp_path: Path) -> None:
    path = FOLDER / "configs" / f"{kind.format(method)}_{METHODS[method]}.py"
    metrics = shared.train_and_evaluate(small(path, kind, ade, tmp_path))
    assert 0.0 <= metrics["mIoU"] <= 100.0


@pytest.mark.slow
def test_windows_at_several_scales_with_mirror_images(ade: Path, tmp_path: Path) -> None:
    """Testing as the papers' "ms + flip" does, for the larger crop: as mmsegmentation's own tools put it together."""
    path = next(path for path in CONFIGS if path.stem.endswith("swin-b-p4-w7-in22k_8xb2-160k_ade20k-640x640"))
    cfg = small(path, "swin/{}_swin-t-p4-w7", ade, tmp_path)
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
