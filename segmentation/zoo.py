"""The configurations of segmentation. mIoU is that of the source, on the validation split; see the README."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.application import Application, Row, Table, compose, image_settings

if TYPE_CHECKING:
    from mmengine.config import Config

GRAMMAR = re.compile(
    r"(?P<method>upernet|fpn)_(?P<backbone>[^_]+)_8xb2-(?P<schedule>80k|160k)_ade20k-(?P<crop>512x512|640x640)"
)
SCHEDULES = {"80k": "pvt_80k", "160k": "swin_160k"}
PARTS = ("train", "val", "test")
SIZES = ("scale", "crop_size", "size", "stride")
OFFICIAL = ("pvt_v2",)  # whose published checkpoints compute as in the authors' code; of Twins as in mmsegmentation

# whose settings a row has
AUTHORS = "{} as in its authors' code."
AUTHORS_22K = "{} pretrained on ImageNet-22K as in its authors' code."
FPN_PVTV2 = "{} with the settings of its paper and the drop path of its code; see the schedule for its number of steps."
FPN_SWIN = "{} in the PVT setting, in which other papers report it; the drop path is that of Twins."
FPN_TWINS = "{} in the PVT setting, in which its paper reports it, with mmsegmentation's drop path."
UPERNET_PVTV2 = "Nobody published {} in UPerNet: the settings of Swin, with the drop path of PVTv2's Semantic FPN."
UPERNET_TWINS = "{} as mmsegmentation trains it; the authors speak of Swin's setting, and their code has no configs."


def nobody(like: str, *, decay: bool = True) -> str:
    """`decay`: whether that is of parameters that would have some."""
    more = ", and no weight decay on the scale and the position bias of its attention, as in its pretraining"
    return f"Nobody published {{}} on ADE20K: the settings of {like}{more if decay else ''}."


TABLES = (
    Table(
        "UPerNet, 160k steps, 512 x 512",
        "upernet_{}_8xb2-160k_ade20k-512x512",
        ("Backbone", "mIoU", "ms + flip"),
        (
            Row("swin-t-p4-w7", 0.3, "44.51 45.81", "[Swin]", "59.9; 60; 235; 945 at 512x2048, p", AUTHORS),
            Row("swin-s-p4-w7", 0.3, "47.64 49.47", "[Swin]", "81.3; 81; 257; 1038 at 512x2048, p", AUTHORS),
            Row("swin-b-p4-w7", 0.3, "48.13 49.72", "[Swin]", "121.3; 121; 293; 1188 at 512x2048, p", AUTHORS),
            Row("swinv2-t-w8", 0.3, "", "", "60.0; -; 235; -", nobody("Swin-T")),
            Row("swinv2-s-w8", 0.3, "", "", "81.4; -; 257; -", nobody("Swin-S")),
            Row("swinv2-b-w8", 0.3, "", "", "121.4; -; 293; -", nobody("Swin-B")),
            Row("pvtv2-b0", 0.1, "", "", "31.7; -; 214; -", UPERNET_PVTV2),
            Row("pvtv2-b1", 0.1, "", "", "44.0; -; 223; -", UPERNET_PVTV2),
            Row("pvtv2-b2", 0.1, "", "", "55.3; -; 235; -", UPERNET_PVTV2),
            Row("pvtv2-b2-li", 0.1, "", "", "52.5; -; 230; -", UPERNET_PVTV2),
            Row("pvtv2-b3", 0.1, "", "", "75.2; -; 251; -", UPERNET_PVTV2),
            Row("pvtv2-b4", 0.1, "", "", "92.5; -; 270; -", UPERNET_PVTV2),
            Row("pvtv2-b5", 0.1, "", "", "111.9; -; 280; -", UPERNET_PVTV2),
            Row("twins-pcpvt-s", 0.2, "46.2 47.5", "[Twins]", "54.1; 54.6; 234; 234", UPERNET_TWINS),
            Row("twins-pcpvt-b", 0.3, "47.1 48.4", "[Twins]", "73.8; 74.3; 250; 250", UPERNET_TWINS),
            Row("twins-pcpvt-l", 0.3, "48.6 49.8", "[Twins]", "91.0; 91.5; 269; 269", UPERNET_TWINS),
            Row("twins-svt-s", 0.2, "46.2 47.1", "[Twins]", "53.9; 54.4; 227; 228", UPERNET_TWINS),
            Row("twins-svt-b", 0.2, "47.4 48.9", "[Twins]", "87.7; 88.5; 259; 261", UPERNET_TWINS),
            Row("twins-svt-l", 0.3, "48.8 50.2", "[Twins]", "132.8; 133; 295; 297", UPERNET_TWINS),
        ),
    ),
    Table(
        "UPerNet, 160k steps, 640 x 640, pretrained on ImageNet-22K",
        "upernet_{}_8xb2-160k_ade20k-640x640",
        ("Backbone", "mIoU", "ms + flip"),
        (
            Row(
                "swin-b-p4-w7-in22k", 0.3, "50.04 51.66", "[Swin]", "121.3; 121; 458; 1841 at 640x2560, p", AUTHORS_22K
            ),
            Row(
                "swin-l-p4-w7-in22k", 0.3, "52.05 53.53", "[Swin]", "233.8; 234; 616; 3230 at 640x2560, x", AUTHORS_22K
            ),
            Row(
                "swinv2-b-w12-in22k",
                0.3,
                "",
                "",
                "121.4; -; 464; -",
                nobody("Swin-B") + " The windows are those of the pretraining at 192 x 192.",
            ),
        ),
    ),
    Table(
        "Semantic FPN, 80k steps, 512 x 512",
        "fpn_{}_8xb2-80k_ade20k-512x512",
        ("Backbone", "mIoU"),
        (
            Row("swin-t-p4-w7", 0.2, "41.5", "[CSWin]", "31.9; 31.9; 45; 182 at 512x2048, p, a", FPN_SWIN),
            Row("swin-s-p4-w7", 0.2, "45.2", "[CSWin]", "53.2; 53.2; 68; 274 at 512x2048, p, a", FPN_SWIN),
            Row("swin-b-p4-w7", 0.2, "46.0", "[CSWin]", "91.2; 91.2; 103; 422 at 512x2048, p, a", FPN_SWIN),
            Row("swinv2-t-w8", 0.2, "", "", "32.0; -; 45; -", nobody("Swin-T", decay=False)),
            Row("swinv2-s-w8", 0.2, "", "", "53.3; -; 68; -", nobody("Swin-S", decay=False)),
            Row("swinv2-b-w8", 0.2, "", "", "91.4; -; 103; -", nobody("Swin-B", decay=False)),
            Row("pvtv2-b0", 0.1, "37.2", "[PVTv2]", "7.5; 7.6; 25; 25", FPN_PVTV2),
            Row("pvtv2-b1", 0.1, "42.5", "[PVTv2]", "17.8; 17.8; 34; 34.2", FPN_PVTV2),
            Row("pvtv2-b2", 0.1, "45.2", "[PVTv2]", "29.1; 29.1; 46; 45.8", FPN_PVTV2),
            Row("pvtv2-b2-li", 0.1, "45.1", "[PVTv2]", "26.3; 26.3; 41; 41", FPN_PVTV2),
            Row("pvtv2-b3", 0.1, "47.3", "[PVTv2]", "49.0; 49; 62; 62.4", FPN_PVTV2),
            Row("pvtv2-b4", 0.1, "47.9", "[PVTv2]", "66.3; 66.3; 81; 81.3", FPN_PVTV2),
            Row("pvtv2-b5", 0.1, "48.7", "[PVTv2]", "85.7; 85.7; 91; 91.1", FPN_PVTV2),
            Row("twins-pcpvt-s", 0.2, "44.3", "[CSWin]", "27.9; 28.4; 44; 162 at 512x2048, a", FPN_TWINS),
            Row("twins-pcpvt-b", 0.2, "44.9", "[CSWin]", "47.6; 48.1; 61; 220 at 512x2048, a", FPN_TWINS),
            Row("twins-pcpvt-l", 0.2, "46.4", "[CSWin]", "64.7; 65.3; 80; 283 at 512x2048, a", FPN_TWINS),
            Row("twins-svt-s", 0.2, "43.2", "[CSWin]", "27.8; 28.3; 38; 144 at 512x2048, a", FPN_TWINS),
            Row("twins-svt-b", 0.2, "45.3", "[CSWin]", "59.7; 60.4; 69; 261 at 512x2048, a", FPN_TWINS),
            Row("twins-svt-l", 0.3, "46.7", "[CSWin]", "102.7; 103.7; 104; 404 at 512x2048, a", FPN_TWINS),
        ),
    ),
)


def build(parts: Mapping[str, str], row: Row | None) -> Config:
    _, backbone = image_settings(TABLES, GRAMMAR, parts, row, OFFICIAL)
    recipes = (f"models/{parts['method']}", "datasets/ade20k", f"schedules/{SCHEDULES[parts['schedule']]}")
    cfg = compose("segmentation", recipes, {"model.backbone": backbone, **(row.differs if row else {})})
    if parts["crop"] == "640x640":
        for node in (cfg.model, cfg.tta_pipeline, *(cfg[f"{part}_dataloader"].dataset for part in PARTS)):
            _enlarge(node)
        cfg.train_pipeline, cfg.test_pipeline = (cfg[f"{part}_dataloader"].dataset.pipeline for part in PARTS[:2])
    return cfg


def _enlarge(node: Any) -> None:
    """From crops of 512 pixels to those of 640, in place: sizes of pictures, crops and windows."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if key in SIZES:
            node[key] = tuple(side * 640 // 512 for side in value)
        elif isinstance(value, list | dict):
            _enlarge(value)


SEGMENTATION = Application(
    name="segmentation",
    scope="mmseg",
    layout="ADE20K's layout: data/ade/ADEChallengeData2016 with {images,annotations}/{training,validation}/",
    amp_part="",
    shape=(512, 512),
    tables=TABLES,
    grammar=GRAMMAR,
    build=build,
)
