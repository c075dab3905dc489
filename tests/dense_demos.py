"""What the tests of the demos share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from classification import train
from hvt_backbones.openmmlab import HVTBackbone

Main = Callable[[list[str]], int]
Forward = Callable[[HVTBackbone, Tensor], tuple[Tensor, ...]]


def quick_demo(main: Main, folder: Path, seed: int = 0) -> tuple[int, str]:
    """Run `--quick` below `folder`; returns the exit status and what was printed."""
    printed = io.StringIO()
    arguments = ["--quick", "--seed", str(seed), "--work-dir", str(folder / "run"), "--data-dir", str(folder / "data")]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(arguments)
    return status, printed.getvalue()


def beside(forward: Forward) -> Forward:
    """Things appear half a picture beside where they are."""
    return lambda backbone, images: tuple(one.roll(one.shape[-1] // 2, -1) for one in forward(backbone, images))


def quick_demo_of_a_broken_backbone(
    main: Main, folder: Path, breaking: Callable[[Forward], Forward] = beside
) -> tuple[int, str]:
    """The same, from the weights of a run in `folder`, with a backbone whose forward is broken so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "main", lambda options: 0)
        patch.setattr(HVTBackbone, "forward", breaking(HVTBackbone.forward))
        return quick_demo(main, folder)


def check_pictures(folder: Path) -> None:
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
