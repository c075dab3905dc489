"""What the tests of the two demos share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from hvt_backbones.openmmlab import HVTBackbone

Main = Callable[[list[str]], int]


def quick_demo(main: Main, folder: Path) -> tuple[int, str]:
    """Run `--quick` below `folder`; returns the exit status and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(["--quick", "--work-dir", str(folder / "run"), "--data-dir", str(folder / "data")])
    return status, printed.getvalue()


def quick_demo_of_a_broken_backbone(main: Main, folder: Path, demo: Any) -> tuple[int, str]:
    """The same, from the weights of a run in `folder`, where things appear half a picture beside where they are."""
    whole = HVTBackbone.forward

    def broken(self: HVTBackbone, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.roll(one.shape[-1] // 2, -1) for one in whole(self, images))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_train_classifier", lambda options: None)
        patch.setattr(HVTBackbone, "forward", broken)
        return quick_demo(main, folder)


def check_pictures(folder: Path) -> None:
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
