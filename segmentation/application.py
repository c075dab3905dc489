"""What the commands of segmentation say to those that they share with detection."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path

from hvt_backbones.openmmlab_commands.application import Application
from hvt_backbones.openmmlab_commands.shims import prepare_imports


def prepare() -> None:
    """Import mmseg, which prints that it does without OneDL."""
    prepare_imports()
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("mmseg.datasets")


SEGMENTATION = Application(
    name="segmentation",
    scope="mmseg",
    configs=Path(__file__).parent / "configs",
    layout="ADE20K's layout: data/ade/ADEChallengeData2016 with {images,annotations}/{training,validation}/",
    amp_part="",
    shape=(512, 512),
    prepare=prepare,
)
