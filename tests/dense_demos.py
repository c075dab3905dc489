"""What the tests of the demos share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Main = Callable[[list[str]], int]


def quick_demo(main: Main, folder: Path) -> tuple[int, str]:
    """Run `--quick` below `folder`; returns the exit status and what was printed."""
    printed = io.StringIO()
    arguments = ["--quick", "--work-dir", str(folder / "run"), "--data-dir", str(folder / "data")]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(arguments)
    return status, printed.getvalue()


def check_pictures(folder: Path) -> None:
    for name in ("predictions.png", "curves.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300
