"""The configurations of detection. AP is that of the source, on val2017; the README says how the rest is counted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.application import Application, Row, Table, compose, image_settings

if TYPE_CHECKING:
    from mmengine.config import Config

GRAMMAR = re.compile(
    r"(?P<method>mask-rcnn|cascade-mask-rcnn|retinanet)_(?P<backbone>[^_]+)_fpn_(?P<schedule>1x|ms-crop-3x)_coco"
)
OFFICIAL = ("pvt_v2", "twins_pcpvt", "twins_svt")  # whose published checkpoints compute as in the authors' code

# whose settings a row has
AUTHORS = "{} as in its authors' code."
MMDETECTION = "{} as mmdetection trains it at one scale; Swin's own code has results of multi-scale training only."
NO_MASK_RCNN = "The authors' code has no {} for Mask R-CNN: its optimiser, the drop path of {} in Cascade Mask R-CNN."
PVTV2_SWIN = "{} as in its authors' code, which has the optimiser of Swin."
PVTV2_HEADS = "{} as in its authors' code, which has the optimiser and the heads of Swin."
TWINS_3X = "The authors' code has no {} at 3x: the settings of its smaller models."
ONE_SCALE = "The authors' code has no {} at one scale: the optimiser and drop path of its multi-scale training."
PVTV2 = "{} as in the code of PVTv2."
PVTV2_3X = "The authors' code has no {} at 3x: the settings of its PVTv2-B2, which are those of Swin."
TWINS_PVT = "{} as in the code of Twins (its PVT setting)."
TWINS_SWIN = "{} as in its authors' code (its Swin setting)."
CASCADE = "Nobody published {} in Cascade Mask R-CNN: the settings of Swin, the drop path of its Mask R-CNN."
RETINANET = (
    "The authors published no RetinaNet, and mmdetection's config has no result: the settings of {}'s Mask R-CNN."
)
LONGER_WARMUP = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 1000},
    {"type": "MultiStepLR", "begin": 0, "end": 12, "by_epoch": True, "milestones": [8, 11], "gamma": 0.1},
]


def nobody(like: str) -> str:
    return (
        f"Nobody published {{}} on COCO: the settings of {like}, and no weight decay on the scale and the position "
        "bias of its attention, as in its pretraining."
    )


def small_batches(lr: float) -> dict[str, Any]:
    """Of 8 devices with a picture each."""
    return {
        "train_dataloader.batch_size": 1,
        "optim_wrapper.optimizer.lr": lr / 1.4,
        "auto_scale_lr.base_batch_size": 8,
    }


TABLES = (
    Table(
        "Mask R-CNN, 1x",
        "mask-rcnn_{}_fpn_1x_coco",
        ("Backbone", "box AP", "mask AP"),
        (
            Row(
                "swin-t-p4-w7",
                0.2,
                "42.7 39.3",
                "[mmdetection]",
                "47.8; 48; 263; 267, p",
                MMDETECTION,
                {"param_scheduler": LONGER_WARMUP},
            ),
            Row("swin-s-p4-w7", 0.2, "44.8 40.9", "[CSWin]", "69.1; 69; 350; 359, p", ONE_SCALE),
            Row("swin-b-p4-w7", 0.3, "46.9 42.3", "[CSWin]", "107.1; 107; 488; 496, p, a", ONE_SCALE),
            Row("swinv2-t-w8", 0.2, "", "", "47.9; -; 264; -", nobody("Swin-T")),
            Row("swinv2-s-w8", 0.2, "", "", "69.2; -; 351; -", nobody("Swin-S")),
            Row("swinv2-b-w8", 0.3, "", "", "107.3; -; 490; -", nobody("Swin-B")),
            Row("pvtv2-b0", 0.1, "38.2 36.2", "[PVT]", "23.4; 23.5; 196; -", PVTV2),
            Row("pvtv2-b1", 0.1, "41.8 38.8", "[PVT]", "33.7; 33.7; 243; -", PVTV2),
            Row("pvtv2-b2", 0.1, "45.3 41.2", "[PVT]", "45.0; 45; 309; -", PVTV2),
            Row("pvtv2-b2-li", 0.1, "44.1 40.5", "[PVTv2]", "42.2; 42.2; 245; -", PVTV2),
            Row("pvtv2-b3", 0.1, "47.0 42.5", "[PVT]", "64.9; 64.9; 397; -", PVTV2),
            Row("pvtv2-b4", 0.1, "47.5 42.7", "[PVT]", "82.2; 82.2; 499; -", PVTV2, small_batches(0.0002)),
            Row("pvtv2-b5", 0.1, "47.4 42.5", "[PVT]", "101.6; 101.6; 556; -", PVTV2, small_batches(0.0002)),
            Row("twins-pcpvt-s", 0.2, "42.9 40.0", "[CSWin]", "43.8; 44; 304; 245, a", TWINS_PVT),
            Row("twins-pcpvt-b", 0.2, "44.6 40.9", "[CSWin]", "63.5; 64; 392; 302, a", TWINS_PVT),
            Row("twins-pcpvt-l", 0.2, "45.4 41.5", "[CSWin]", "80.6; 81; 493; 364, a", TWINS_PVT),
            Row("twins-svt-s", 0.2, "43.4 40.3", "[CSWin]", "43.7; 44; 253; 228, a", TWINS_PVT),
            Row("twins-svt-b", 0.2, "45.2 41.5", "[CSWin]", "75.6; 76; 391; 340, a", TWINS_PVT),
            Row("twins-svt-l", 0.2, "45.9 41.6", "[CSWin]", "118.6; 111, x; 541; 474, a", TWINS_PVT),
        ),
    ),
    Table(
        "Mask R-CNN, 3x with multi-scale training and crops",
        "mask-rcnn_{}_fpn_ms-crop-3x_coco",
        ("Backbone", "box AP", "mask AP"),
        (
            Row("swin-t-p4-w7", 0.2, "46.0 41.6", "[Swin detection]", "47.8; 48; 263; 267, p", AUTHORS),
            Row("swin-s-p4-w7", 0.2, "48.5 43.3", "[Swin detection]", "69.1; 69; 350; 359, p", AUTHORS),
            Row("swin-b-p4-w7", 0.3, "48.5 43.4", "[CSWin]", "107.1; 107; 488; 496, p, a", NO_MASK_RCNN),
            Row("swinv2-t-w8", 0.2, "", "", "47.9; -; 264; -", nobody("Swin-T")),
            Row("swinv2-s-w8", 0.2, "", "", "69.2; -; 351; -", nobody("Swin-S")),
            Row("swinv2-b-w8", 0.3, "", "", "107.3; -; 490; -", nobody("Swin-B")),
            Row("pvtv2-b0", 0.1, "", "", "23.4; 23.5; 196; -", PVTV2_3X),
            Row("pvtv2-b1", 0.1, "44.9 40.8", "[ViT-Adapter]", "33.7; 33.7; 243; -", PVTV2_3X),
            Row("pvtv2-b2", 0.1, "47.8 43.1", "[ViT-Adapter]", "45.0; 45; 309; -", PVTV2_SWIN),
            Row("pvtv2-b2-li", 0.1, "", "", "42.2; 42.2; 245; -", PVTV2_SWIN),
            Row("pvtv2-b3", 0.1, "", "", "64.9; 64.9; 397; -", PVTV2_3X),
            Row("pvtv2-b4", 0.1, "", "", "82.2; 82.2; 499; -", PVTV2_3X),
            Row("pvtv2-b5", 0.1, "48.4 42.9", "[ViT-Adapter]", "101.6; 101.6; 556; -", PVTV2_3X),
            Row("twins-pcpvt-s", 0.2, "46.8 42.6", "[CSWin]", "43.8; 44; 304; 245, a", TWINS_SWIN),
            Row("twins-pcpvt-b", 0.2, "47.9 43.2", "[CSWin]", "63.5; 64; 392; 302, a", TWINS_SWIN),
            Row("twins-pcpvt-l", 0.2, "", "", "80.6; 81; 493; 364, a", TWINS_3X),
            Row("twins-svt-s", 0.2, "46.8 42.6", "[CSWin]", "43.7; 44; 253; 228, a", TWINS_SWIN),
            Row("twins-svt-b", 0.2, "48.0 43.0", "[CSWin]", "75.6; 76; 391; 340, a", TWINS_SWIN),
            Row("twins-svt-l", 0.2, "", "", "118.6; 111, x; 541; 474, a", TWINS_SWIN),
        ),
    ),
    Table(
        "Cascade Mask R-CNN, 3x with multi-scale training and crops",
        "cascade-mask-rcnn_{}_fpn_ms-crop-3x_coco",
        ("Backbone", "box AP", "mask AP"),
        (
            Row("swin-t-p4-w7", 0.2, "50.4 43.7", "[Swin detection]", "85.6; 86; 741; 745, p", AUTHORS),
            Row("swin-s-p4-w7", 0.2, "51.9 45.0", "[Swin detection]", "106.9; 107; 828; 838, p", AUTHORS),
            Row("swin-b-p4-w7", 0.3, "51.9 45.0", "[Swin detection]", "145.0; 145; 966; 982, p", AUTHORS),
            Row("swinv2-t-w8", 0.2, "", "", "85.7; -; 742; -", nobody("Swin-T")),
            Row("swinv2-s-w8", 0.2, "", "", "107.1; -; 830; -", nobody("Swin-S")),
            Row("swinv2-b-w8", 0.3, "", "", "145.1; -; 968; -", nobody("Swin-B")),
            Row("pvtv2-b0", 0.1, "", "", "61.3; -; 674; -", CASCADE),
            Row("pvtv2-b1", 0.1, "", "", "71.5; -; 722; -", CASCADE),
            Row("pvtv2-b2", 0.1, "51.1 44.4", "[PVT]", "82.9; -; 787; -", PVTV2_HEADS),
            Row("pvtv2-b2-li", 0.1, "50.9 44.0", "[PVT]", "80.0; -; 723; -", PVTV2_HEADS),
            Row("pvtv2-b3", 0.1, "", "", "102.7; -; 875; -", CASCADE),
            Row("pvtv2-b4", 0.1, "", "", "120.0; -; 978; -", CASCADE),
            Row("pvtv2-b5", 0.1, "", "", "139.4; -; 1034; -", CASCADE),
            Row("twins-pcpvt-s", 0.2, "", "", "81.6; -; 783; -", CASCADE),
            Row("twins-pcpvt-b", 0.2, "", "", "101.3; -; 870; -", CASCADE),
            Row("twins-pcpvt-l", 0.2, "", "", "118.5; -; 972; -", CASCADE),
            Row("twins-svt-s", 0.2, "", "", "81.5; -; 731; -", CASCADE),
            Row("twins-svt-b", 0.2, "", "", "113.4; -; 870; -", CASCADE),
            Row("twins-svt-l", 0.2, "", "", "156.5; -; 1019; -", CASCADE),
        ),
    ),
    Table(
        "RetinaNet, 1x",
        "retinanet_{}_fpn_1x_coco",
        ("Backbone", "box AP"),
        (
            Row("swin-t-p4-w7", 0.2, "", "", "38.5; -; 244; -", RETINANET),
            Row("swin-s-p4-w7", 0.2, "", "", "59.8; -; 331; -", RETINANET),
            Row("swin-b-p4-w7", 0.3, "", "", "98.4; -; 468; -", RETINANET),
            Row("swinv2-t-w8", 0.2, "", "", "38.5; -; 245; -", nobody("Swin-T's Mask R-CNN")),
            Row("swinv2-s-w8", 0.2, "", "", "59.9; -; 332; -", nobody("Swin-S's Mask R-CNN")),
            Row("swinv2-b-w8", 0.3, "", "", "98.5; -; 470; -", nobody("Swin-B's Mask R-CNN")),
            Row("pvtv2-b0", 0.1, "37.2", "[PVT]", "12.9; 13; 178; -", PVTV2),
            Row("pvtv2-b1", 0.1, "41.2", "[PVT]", "23.7; 23.8; 225; -", PVTV2),
            Row("pvtv2-b2", 0.1, "44.6", "[PVT]", "35.1; 35.1; 290; -", PVTV2),
            Row("pvtv2-b2-li", 0.1, "43.6", "[PVT]", "32.3; 32.3; 227; -", PVTV2),
            Row("pvtv2-b3", 0.1, "45.9", "[PVT]", "55.0; 55; 378; -", PVTV2),
            Row("pvtv2-b4", 0.1, "46.1", "[PVT]", "72.3; 72.3; 481; -", PVTV2, small_batches(0.0001)),
            Row("pvtv2-b5", 0.1, "46.2", "[PVT]", "91.7; 91.7; 538; -", PVTV2, small_batches(0.0001)),
            Row("twins-pcpvt-s", 0.2, "", "", "33.8; -; 286; -", TWINS_PVT),
            Row("twins-pcpvt-b", 0.2, "", "", "53.6; -; 373; -", TWINS_PVT),
            Row("twins-pcpvt-l", 0.2, "", "", "70.7; -; 475; -", TWINS_PVT),
            Row("twins-svt-s", 0.2, "", "", "33.8; -; 235; -", TWINS_PVT),
            Row("twins-svt-b", 0.2, "", "", "66.2; -; 372; -", TWINS_PVT),
            Row("twins-svt-l", 0.2, "", "", "109.9; -; 522; -", TWINS_PVT),
        ),
    ),
)


def build(parts: Mapping[str, str], row: Row | None) -> Config:
    method = parts["method"]
    variant, backbone = image_settings(TABLES, GRAMMAR, parts, row, OFFICIAL)
    settings: dict[str, Any] = {"model.backbone": backbone}
    if parts["schedule"] == "ms-crop-3x":
        data, schedule = "coco_instance_ms-crop", "swin_3x"
    elif variant.family in OFFICIAL:
        data, schedule = "coco_instance", "pvt_1x"
        if method != "retinanet":
            settings["optim_wrapper.optimizer.lr"] = 0.0002
    else:
        data, schedule = "coco_instance", "swin_1x"
    recipes = (f"models/{method}_fpn", f"datasets/{data}", f"schedules/{schedule}")
    cfg = compose("detection", recipes, {**settings, **(row.differs if row else {})})
    if method == "retinanet":
        _leave_out_masks(cfg)
    return cfg


def _leave_out_masks(cfg: Config) -> None:
    datasets = [cfg[f"{part}_dataloader"].dataset for part in ("train", "val", "test")]
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline, *(dataset.pipeline for dataset in datasets)):
        for step in pipeline:
            step.pop("with_mask", None)
    for part in ("val", "test"):
        cfg[f"{part}_evaluator"].metric = "bbox"


DETECTION = Application(
    name="detection",
    scope="mmdet",
    layout="COCO's layout: data/coco with annotations/instances_{train,val}2017.json, train2017/ and val2017/",
    amp_part="backbone",
    shape=(800, 1280),
    tables=TABLES,
    grammar=GRAMMAR,
    build=build,
)
