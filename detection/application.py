"""What the commands of detection say to those that they share with segmentation."""

from __future__ import annotations

from pathlib import Path

from runner.application import Application

from .zoo import ZOO

DETECTION = Application(
    name="detection",
    scope="mmdet",
    configs=Path(__file__).parent / "configs",
    zoo=ZOO,
    layout="COCO's layout: data/coco with annotations/instances_{train,val}2017.json, train2017/ and val2017/",
    amp_part="backbone",
    shape=(800, 1280),
)
