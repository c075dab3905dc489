"""A tiny COCO data set and a tiny Mask R-CNN, for all tests of the session."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.patches import import_framework
from tests.dense_runs import BACKBONE, CLASSES, SIDE, draw_coco, untouched_mmengine, write_config

import_framework("mmdet")

ANCHORS = dict(type="AnchorGenerator", scales=[4], ratios=[1.0], strides=[4, 8, 16, 32])
CODER = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
CLASS_LOSS = dict(type="CrossEntropyLoss", loss_weight=1.0)
BOX_LOSS = dict(type="L1Loss", loss_weight=1.0)
ASSIGNER = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3, ignore_iof_thr=-1)
SAMPLER = dict(type="RandomSampler", num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
MODEL = dict(
    type="MaskRCNN",
    data_preprocessor=dict(
        type="DetDataPreprocessor", mean=[110.0] * 3, std=[50.0] * 3, pad_mask=True, pad_size_divisor=32
    ),
    backbone=BACKBONE,
    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4),
    rpn_head=dict(
        type="RPNHead", in_channels=16, feat_channels=16, anchor_generator=ANCHORS, bbox_coder=CODER,
        loss_cls=dict(CLASS_LOSS, use_sigmoid=True), loss_bbox=BOX_LOSS,
    ),
    roi_head=dict(
        type="StandardRoIHead",
        bbox_roi_extractor=dict(
            type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=7), out_channels=16,
            featmap_strides=[4, 8, 16, 32],
        ),
        bbox_head=dict(
            type="Shared2FCBBoxHead", in_channels=16, fc_out_channels=32, roi_feat_size=7, num_classes=2,
            bbox_coder=CODER, reg_class_agnostic=False, loss_cls=CLASS_LOSS, loss_bbox=BOX_LOSS,
        ),
        mask_roi_extractor=dict(
            type="SingleRoIExtractor", roi_layer=dict(type="RoIAlign", output_size=14), out_channels=16,
            featmap_strides=[4, 8, 16, 32],
        ),
        mask_head=dict(
            type="FCNMaskHead", num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=ASSIGNER, sampler=dict(SAMPLER, add_gt_as_proposals=False), allowed_border=-1, pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms_pre=100, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(assigner=ASSIGNER, sampler=SAMPLER, mask_size=28, pos_weight=-1, debug=False),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=100, max_per_img=50, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.01, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20, mask_thr_binary=0.5),
    ),
)  # fmt: skip
TRAIN = ("--amp", "--auto-scale-lr")


def loader(split: str, root: str) -> dict[str, Any]:
    training = split == "train2017"
    keys = () if training else ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=training),
        dataset=dict(
            type="CocoDataset",
            data_root=root,
            metainfo=dict(classes=CLASSES, palette=[(220, 40, 40), (40, 60, 220)]),
            ann_file=f"annotations/instances_{split}.json",
            data_prefix=dict(img=f"{split}/"),
            test_mode=not training,
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
                dict(type="Resize", scale=(SIDE, SIDE), keep_ratio=True),
                dict(type="PackDetInputs", **({"meta_keys": keys} if keys else {})),
            ],
        ),
    )


def settings(root: str) -> dict[str, Any]:
    evaluator = dict(type="CocoMetric", ann_file=f"{root}/annotations/instances_val2017.json", metric=["bbox", "segm"])
    return dict(
        default_scope="mmdet",
        model=MODEL,
        train_dataloader=loader("train2017", root),
        val_dataloader=loader("val2017", root),
        test_dataloader=loader("val2017", root),
        val_evaluator=evaluator,
        test_evaluator=evaluator,
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=1),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="gloo")),
    )


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures to train on, two to test on."""
    return draw_coco(tmp_path_factory.mktemp("data") / "coco", {"train2017": 6, "val2017": 2})


@pytest.fixture(scope="session")
def config(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask R-CNN of a few thousand parameters."""
    return write_config(tmp_path_factory.mktemp("configs") / "tiny_mask-rcnn.py", settings(str(coco)))


@pytest.fixture(autouse=True)
def mmengine_as_before() -> Iterator[None]:
    with untouched_mmengine():
        yield


@pytest.fixture(scope="session")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a training run, which ended with an evaluation."""
    from detection.train import main

    folder = tmp_path_factory.mktemp("trained")
    with untouched_mmengine():
        assert main([str(config), "--work-dir", str(folder), "--device", "cpu", *TRAIN]) == 0
    return folder
