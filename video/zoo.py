"""The configurations of video. Accuracies are those of the source, on the validation split; see the README."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.zoo import Row, Table, Zoo, compose

if TYPE_CHECKING:
    from mmengine.config import Config

RECIPES = Path(__file__).parent / "configs/_base_"
GRAMMAR = re.compile(
    r"swin-(?P<size>tiny|small|base|large)-p244-w(?P<window>877|1677)_(?P<pretrained>in1k|in22k|k400)-pre_"
    r"8xb8-(?P<schedule>32x2x1-30e|u32-60e)_(?P<data>kinetics400|kinetics600|sthv2)-rgb"
)
SCHEDULES = {"32x2x1-30e": "swin_30e", "u32-60e": "swin_60e"}
CLASSES = {"kinetics400": 400, "kinetics600": 600, "sthv2": 174}
LOWER_LR = {"optim_wrapper.optimizer.lr": 0.0003}  # of the head; the backbone has a tenth of it
LESS_DECAY = {"optim_wrapper.optimizer.weight_decay": 0.02}


def summed(steps: int) -> dict[str, Any]:
    """Steps whose gradients are summed."""
    return {"optim_wrapper.accumulative_counts": steps}


ROWS = (
    Row(
        "swin-tiny-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        0.1,
        "78.8 93.6",
        "[Video Swin]",
        "28.2; 28; 88; 87.9",
        "{} from Swin-T of ImageNet-1K, as in its authors' code: batches of 4 x 64.",
        {**LESS_DECAY, **summed(4)},
    ),
    Row(
        "swin-small-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        0.1,
        "80.6 94.5",
        "[Video Swin]",
        "49.8; 50; 166; 165.9",
        "{} from Swin-S of ImageNet-1K, as in its authors' code: batches of 8 x 64, drop path 0.1.",
        {**LESS_DECAY, **summed(8)},
    ),
    Row(
        "swin-base-p244-w877_in1k-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        0.3,
        "80.6 94.6",
        "[Video Swin]",
        "88.0; 88; 281; 281.6",
        "{} from Swin-B of ImageNet-1K, as in its authors' code: batches of 8 x 64.",
        summed(8),
    ),
    Row(
        "swin-base-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        0.2,
        "82.7 95.5",
        "[Video Swin]",
        "88.0; 88; 281; 281.6",
        "{} from Swin-B of ImageNet-22K, as in its authors' code: batches of 8 x 64, a lower learning rate.",
        {**LOWER_LR, **summed(8)},
    ),
    Row(
        "swin-large-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        0.4,
        "83.46 95.91",
        "[mmaction2]",
        "197.0; 197; 603; 604",
        "{} from Swin-L of ImageNet-22K, as in mmaction2: batches of 64. Its authors' code has no Swin-L.",
    ),
    Row(
        "swin-base-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics600-rgb",
        0.2,
        "84.0 96.5",
        "[Video Swin]",
        "88.3; 88; 281; 281.6",
        "{} from Swin-B of ImageNet-22K, as in its authors' code, which has it as on Kinetics-400.",
        {**LOWER_LR, **summed(8)},
    ),
    Row(
        "swin-base-p244-w1677_k400-pre_8xb8-u32-60e_sthv2-rgb",
        0.4,
        "69.6 92.7",
        "[Video Swin]",
        "88.8; 89; 320; 320.6",
        "{} with windows of 16 x 7 x 7 from one of Kinetics-400 (and ImageNet-22K), as in its authors' code.",
        {**LOWER_LR, **summed(8)},
    ),
)


def build(parts: Mapping[str, str], row: Row | None) -> Config:
    size, pretrained = parts["size"], parts["pretrained"]
    name = f"video_swin_{size}" if parts["window"] == "877" else f"video_swin_{size}_window16"
    alike = [one for one in ROWS if GRAMMAR.fullmatch(one.name)["size"] == size]
    cls_head = {"num_classes": CLASSES[parts["data"]]}
    if parts["data"] == "sthv2":
        cls_head["label_smooth_eps"] = 0.1
    settings = {
        "model.backbone": {
            "name": name,
            "pretrained": "in22k_ft_k400" if pretrained == "k400" else f"swin_{size}.{pretrained}",
            "drop_path_rate": alike[0].drop_path if row is None else row.drop_path,
        },
        "model.cls_head": cls_head,
    }
    recipes = ("models/video_swin", f"datasets/{parts['data']}", f"schedules/{SCHEDULES[parts['schedule']]}")
    return compose(RECIPES, (*recipes, "default_runtime"), {**settings, **(row or alike[0]).differs})


def label(parts: Mapping[str, str]) -> tuple[str, str]:
    name = f"Video Swin-{parts['size'][0].upper()}"
    weights = {"in1k": "1K", "in22k": "22K", "k400": "K400, 22K"}[parts["pretrained"]]
    return (f"{name}, window 16 x 7 x 7" if parts["window"] == "1677" else name), weights


COLUMNS = ("Backbone", "Pretrained", "Top-1", "Top-5")
ZOO = Zoo(
    rows=ROWS,
    grammar=GRAMMAR,
    build=build,
    label=label,
    tables=(
        Table("Kinetics-400", ".*_kinetics400-rgb", COLUMNS),
        Table("Kinetics-600", ".*_kinetics600-rgb", COLUMNS),
        Table("Something-Something V2", ".*_sthv2-rgb", COLUMNS),
    ),
)
