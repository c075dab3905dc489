"""What the commands of segmentation say to those that they share with detection."""

from __future__ import annotations

from pathlib import Path

from runner.application import Application

from .zoo import ZOO

SEGMENTATION = Application(
    name="segmentation",
    scope="mmseg",
    configs=Path(__file__).parent / "configs",
    zoo=ZOO,
    layout="ADE20K's layout: data/ade/ADEChallengeData2016 with {images,annotations}/{training,validation}/",
    amp_part="",
    shape=(512, 512),
)
