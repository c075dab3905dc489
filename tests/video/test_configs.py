"""The configurations: complete, of the published size and settings, and able to train and be evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from runner.config import open_config
from runner.parts import complete
from tests import dense_configs as shared
from tests.video.conftest import write_clip, write_list
from video.zoo import VIDEO

CLIP = (32, 224, 224)
# stem -> model, image or video weights it starts from, classes, drop path, learning rate of the head, weight decay,
# videos per step of the optimiser on 8 devices, epochs
PUBLISHED = {
    "swin-tiny-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (
        "video_swin_tiny", "swin_tiny.in1k", 400, 0.1, 1e-3, 0.02, 256, 30),
    "swin-small-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (
        "video_swin_small", "swin_small.in1k", 400, 0.1, 1e-3, 0.02, 512, 30),
    "swin-base-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (
        "video_swin_base", "swin_base.in1k", 400, 0.3, 1e-3, 0.05, 512, 30),
    "swin-base-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (
        "video_swin_base", "swin_base.in22k", 400, 0.2, 3e-4, 0.05, 512, 30),
    "swin-large-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (
        "video_swin_large", "swin_large.in22k", 400, 0.4, 1e-3, 0.05, 64, 30),
    "swin-base-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics600-rgb": (
        "video_swin_base", "swin_base.in22k", 600, 0.2, 3e-4, 0.05, 512, 30),
    "swin-base-p244-w1677_k400-pre_8xb8-u32-60e_sthv2-rgb": (
        "video_swin_base_window16", "in22k_ft_k400", 174, 0.4, 3e-4, 0.05, 512, 60),
}  # fmt: skip
# one of each data set -> clips and crops in testing
SMALL = {
    "swin-tiny-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb": (4, 3),
    "swin-base-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics600-rgb": (4, 3),
    "swin-base-p244-w1677_k400-pre_8xb8-u32-60e_sthv2-rgb": (1, 3),
}
WINDOWED = {"embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": (2, 3, 3)}
FRAMES = 8


def test_the_readme_has_the_tables() -> None:
    assert set(VIDEO.rows) == set(PUBLISHED)
    assert shared.readme_is_current(VIDEO)


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_settings(name: str) -> None:
    cfg = VIDEO.config(name)
    backbone, wrapper, loader = cfg.model.backbone, cfg.optim_wrapper, cfg.train_dataloader
    assert cfg.auto_scale_lr.base_batch_size == 8 * loader.batch_size
    assert (
        backbone.name,
        backbone.pretrained.rpartition("/")[2],
        cfg.model.cls_head.num_classes,
        backbone.drop_path_rate,
        wrapper.optimizer.lr,
        wrapper.optimizer.weight_decay,
        8 * loader.batch_size * wrapper.get("accumulative_counts", 1),
        cfg.train_cfg.max_epochs,
    ) == PUBLISHED[name]
    assert cfg.custom_hooks == [{"type": "HVTResumeHook"}]
    warmup, decay = cfg.param_scheduler
    assert (warmup.end, decay.T_max, decay.end) == (2.5, cfg.train_cfg.max_epochs, cfg.train_cfg.max_epochs)
    # left and right are classes of Something-Something
    sthv2 = name.endswith("sthv2-rgb")
    assert any(step.type == "Flip" for step in loader.dataset.pipeline) != sthv2
    assert cfg.model.cls_head.get("label_smooth_eps", 0.0) == (0.1 if sthv2 else 0.0)
    for part in ("train", "val", "test"):  # no list of one data set with the videos of another
        data = cfg[f"{part}_dataloader"].dataset
        source = name.rpartition("_")[2].removesuffix("-rgb")
        assert data.ann_file == f"data/{source}/{source}_{'train' if part == 'train' else 'val'}_list_videos.txt"
        assert data.data_prefix.video.startswith(f"data/{source}/videos")
        assert data.data_prefix.video.endswith(("videos", "videos_train" if part == "train" else "videos_val"))


def flops_of(model: nn.Module) -> shared.Flops:
    features, backbone = shared.count_backbone(model.backbone, CLIP)
    _, head = shared.count(model.cls_head, features)
    return shared.Flops(backbone.total + head.total, backbone.attention)


@pytest.mark.slow
@pytest.mark.parametrize("name", VIDEO.rows)
def test_is_as_large_as_published(name: str) -> None:
    cfg = open_config(name, {}, VIDEO)
    model = shared.build(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay
    pairs = {(group["lr"], group["weight_decay"]) for group in groups}
    assert pairs == {(0.1 * lr, decay), (0.1 * lr, 0.0), (lr, decay)}
    shared.check_figures(VIDEO.rows[name], shared.parameters(model), {CLIP: flops_of(model)}, CLIP)


def small(stem: str, kinetics: Path, work_dir: Path) -> Config:
    cfg = shared.small_config(stem, VIDEO, WINDOWED, work_dir)
    cfg.model.cls_head.num_classes = 8
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        data = cfg[name].dataset
        split = "train" if name.startswith("train") else "val"
        data.ann_file, data.data_prefix = str(kinetics / f"{split}.txt"), {"video": str(kinetics / f"videos_{split}")}
        for step in data.pipeline:
            if "clip_len" in step:
                step.clip_len = FRAMES
    cfg.train_cfg.update(max_epochs=1, val_interval=2)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("stem", SMALL)
def test_trains_and_is_evaluated(stem: str, kinetics: Path, tmp_path: Path) -> None:
    metrics = shared.train_and_evaluate(small(stem, kinetics, tmp_path))
    assert 0.0 <= metrics["acc/top1"] <= metrics["acc/top5"] <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("stem", SMALL)
def test_clips_and_crops(stem: str, tmp_path: Path) -> None:
    """All views of a video are different, and at most `max_testing_views` of them are seen at a time."""
    names = ("first.mp4", "second.mp4")
    for name in names:
        write_clip(tmp_path / "videos_val" / name, 5 * FRAMES)
    write_list(tmp_path / "val.txt", [f"{name} 1" for name in names])
    cfg = small(stem, tmp_path, tmp_path)
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (56, 28)  # the clips are square: now wide, for three crops to differ
            step.keep_ratio = False
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    complete(cfg)
    runner = Runner.from_cfg(cfg)
    seen: list[Tensor] = []
    runner.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    metrics = runner.test()
    assert 0.0 <= metrics["acc/top1"] <= 1.0
    clips, crops = SMALL[stem]
    chunks = [4] * (clips * crops // 4) or [clips * crops]
    assert [tuple(views.shape) for views in seen] == [(count, 3, FRAMES, 28, 28) for count in chunks] * len(names)
    views = [view for batch in seen[: len(chunks)] for view in batch]
    assert len(views) == clips * crops
    assert not any(a.equal(b) for index, a in enumerate(views) for b in views[:index])
