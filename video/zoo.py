"""The configurations of video. Accuracies are those of the source, on the validation split; see the README."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.application import Application, Row, Table, compose, named_rows

if TYPE_CHECKING:
    from mmengine.config import Config

GRAMMAR = re.compile(
    r"swin-(?P<size>tiny|small|base|large)-p244-w(?P<window>877|1677)_(?P<pretrained>in1k|in22k|k400)-pre_"
    r"8xb8-(?P<schedule>32x2x1-30e|u32-60e)_(?P<data>kinetics400|kinetics600|sthv2)-rgb"
)
SCHEDULES = {"32x2x1-30e": "swin_30e", "u32-60e": "swin_60e"}
CLASSES = {"kinetics400": 400, "kinetics600": 600, "sthv2": 174}
# steps whose gradients are summed
STEPS_4, STEPS_8 = {"optim_wrapper.accumulative_counts": 4}, {"optim_wrapper.accumulative_counts": 8}
LESS_DECAY = {"optim_wrapper.optimizer.weight_decay": 0.02}
LOWER_LR = {"optim_wrapper.optimizer.lr": 0.0003, **STEPS_8}  # of the head; the backbone has a tenth of it

# whose settings a row has
TINY = "{} from Swin-T of ImageNet-1K, as in its authors' code: batches of 4 x 64."
SMALL = "{} from Swin-S of ImageNet-1K, as in its authors' code: batches of 8 x 64, drop path 0.1."
BASE = "{} from Swin-B of ImageNet-1K, as in its authors' code: batches of 8 x 64."
BASE_22K = "{} from Swin-B of ImageNet-22K, as in its authors' code: batches of 8 x 64, a lower learning rate."
LARGE = "{} from Swin-L of ImageNet-22K, as in mmaction2: batches of 64. Its authors' code has no Swin-L."
BASE_600 = "{} from Swin-B of ImageNet-22K, as in its authors' code, which has it as on Kinetics-400."
STHV2 = "{} with windows of 16 x 7 x 7 from one of Kinetics-400 (and ImageNet-22K), as in its authors' code."
AUTHORS = "[Video Swin]"
COLUMNS = ("Backbone", "Pretrained", "Top-1", "Top-5")
TABLES = (
    Table(
        "Kinetics-400",
        "swin-{}-pre_8xb8-32x2x1-30e_kinetics400-rgb",
        COLUMNS,
        (
            Row("tiny-p244-w877_in1k", 0.1, "78.8 93.6", AUTHORS, "28.2; 28; 88; 87.9", TINY, LESS_DECAY | STEPS_4),
            Row("small-p244-w877_in1k", 0.1, "80.6 94.5", AUTHORS, "49.8; 50; 166; 165.9", SMALL, LESS_DECAY | STEPS_8),
            Row("base-p244-w877_in1k", 0.3, "80.6 94.6", AUTHORS, "88.0; 88; 281; 281.6", BASE, STEPS_8),
            Row("base-p244-w877_in22k", 0.2, "82.7 95.5", AUTHORS, "88.0; 88; 281; 281.6", BASE_22K, LOWER_LR),
            Row("large-p244-w877_in22k", 0.4, "83.46 95.91", "[mmaction2]", "197.0; 197; 603; 604", LARGE),
        ),
    ),
    Table(
        "Kinetics-600",
        "swin-{}-pre_8xb8-32x2x1-30e_kinetics600-rgb",
        COLUMNS,
        (Row("base-p244-w877_in22k", 0.2, "84.0 96.5", AUTHORS, "88.3; 88; 281; 281.6", BASE_600, LOWER_LR),),
    ),
    Table(
        "Something-Something V2",
        "swin-{}-pre_8xb8-u32-60e_sthv2-rgb",
        COLUMNS,
        (Row("base-p244-w1677_k400", 0.4, "69.6 92.7", AUTHORS, "88.8; 89; 320; 320.6", STHV2, LOWER_LR),),
    ),
)


def build(parts: Mapping[str, str], row: Row | None) -> Config:
    size, pretrained = parts["size"], parts["pretrained"]
    name = f"video_swin_{size}" if parts["window"] == "877" else f"video_swin_{size}_window16"
    # the first of this size, for a combination that is no row
    row = row or next(one for other, one in named_rows(TABLES).items() if GRAMMAR.fullmatch(other)["size"] == size)
    cls_head = {"num_classes": CLASSES[parts["data"]]}
    if parts["data"] == "sthv2":
        cls_head["label_smooth_eps"] = 0.1
    settings = {
        "model.backbone": {
            "name": name,
            "pretrained": "in22k_ft_k400" if pretrained == "k400" else f"swin_{size}.{pretrained}",
            "drop_path_rate": row.drop_path,
        },
        "model.cls_head": cls_head,
    }
    recipes = ("models/video_swin", f"datasets/{parts['data']}", f"schedules/{SCHEDULES[parts['schedule']]}")
    return compose("video", recipes, {**settings, **row.differs})


def label(parts: Mapping[str, str]) -> tuple[str, str]:
    name = f"Video Swin-{parts['size'][0].upper()}"
    weights = {"in1k": "1K", "in22k": "22K", "k400": "K400, 22K"}[parts["pretrained"]]
    return (f"{name}, window 16 x 7 x 7" if parts["window"] == "1677" else name), weights


def adapt(cfg: Any) -> None:
    from . import clips  # imports mmaction2

    clips.adapt(cfg)


VIDEO = Application(
    name="video",
    scope="mmaction",
    layout="Kinetics' layout: data/kinetics400 with kinetics400_{train,val}_list_videos.txt (a line `path label` for "
    "each clip), videos_train/ and videos_val/",
    amp_part="backbone",  # mmaction2's heads convert what they return to NumPy, which has no bf16
    shape=(32, 224, 224),
    tables=TABLES,
    grammar=GRAMMAR,
    build=build,
    label=label,
    adapt=adapt,
)
