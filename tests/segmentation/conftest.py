"""A tiny ADE20K data set and a tiny Semantic FPN, for all tests of the session."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.patches import import_framework
from tests.dense_runs import BACKBONE, CLASSES, COLOURS, SIDE, draw_ade, untouched_mmengine, write_config

import_framework("mmseg")

META = dict(classes=("ground", *CLASSES), palette=[[120, 120, 120], *map(list, COLOURS)])
MODEL = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor", mean=[110.0] * 3, std=[50.0] * 3, bgr_to_rgb=True, pad_val=0, seg_pad_val=255,
        size=(SIDE, SIDE),
    ),
    backbone=BACKBONE,
    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    decode_head=dict(
        type="FPNHead", in_channels=[16] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32], channels=16,
        dropout_ratio=0.0, num_classes=3, norm_cfg=dict(type="SyncBN", requires_grad=True), align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)  # fmt: skip
LOAD = dict(type="LoadImageFromFile")
RESIZE = dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True)
ANNOTATIONS = dict(type="LoadAnnotations", reduce_zero_label=True)
PACK = dict(type="PackSegInputs")
TRAIN = ("--amp",)


def loader(split: str, root: str) -> dict[str, Any]:
    training = split == "training"
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type="InfiniteSampler" if training else "DefaultSampler", shuffle=training),
        dataset=dict(
            type="BaseSegDataset",
            data_root=root,
            metainfo=META,
            reduce_zero_label=True,
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
            test_mode=not training,
            pipeline=[LOAD, ANNOTATIONS, RESIZE, PACK] if training else [LOAD, RESIZE, ANNOTATIONS, PACK],
        ),
    )


def settings(root: str) -> dict[str, Any]:
    evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
    return dict(
        default_scope="mmseg",
        model=MODEL,
        train_dataloader=loader("training", root),
        val_dataloader=loader("validation", root),
        test_dataloader=loader("validation", root),
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        param_scheduler=[dict(type="PolyLR", eta_min=0.0, power=1.0, begin=0, end=4, by_epoch=False)],
        auto_scale_lr=dict(enable=False, base_batch_size=8),
        default_hooks=dict(
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
            logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False),
        ),
        log_processor=dict(by_epoch=False),
        randomness=dict(seed=0),
        env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="gloo")),
        tta_model=dict(type="SegTTAModel"),
        tta_pipeline=[
            LOAD,
            dict(
                type="TestTimeAug",
                transforms=[
                    [dict(type="Resize", scale_factor=ratio, keep_ratio=True) for ratio in (0.5, 1.0)],
                    [dict(type="RandomFlip", prob=prob, direction="horizontal") for prob in (0.0, 1.0)],
                    [ANNOTATIONS],
                    [PACK],
                ],
            ),
        ],
    )


@pytest.fixture(scope="session")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures to train on, four to test on."""
    root = tmp_path_factory.mktemp("data") / "ade" / "ADEChallengeData2016"
    return draw_ade(root, {"training": 8, "validation": 4})


@pytest.fixture(scope="session")
def config(ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Semantic FPN of a few thousand parameters."""
    return write_config(tmp_path_factory.mktemp("configs") / "tiny_fpn.py", settings(str(ade)))


@pytest.fixture(autouse=True)
def mmengine_as_before() -> Iterator[None]:
    with untouched_mmengine():
        yield


@pytest.fixture(scope="session")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a training run, which ended with an evaluation."""
    from segmentation.train import main

    folder = tmp_path_factory.mktemp("trained")
    with untouched_mmengine():
        assert main([str(config), "--work-dir", str(folder), "--device", "cpu", *TRAIN]) == 0
    return folder
