"""The two places where the maintained packages of OpenMMLab do not fit together as they are installed.

mmdetection 3.5 imports `imgaug`, which needs an old numpy and a second OpenCV, for the augmentation of lanes alone.
mmsegmentation's configurations (`mmseg::...` as a base) are looked up under the name of the package before the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from types import ModuleType
from typing import Any

IMGAUG = ("imgaug", "imgaug.augmenters", "imgaug.augmentables", "imgaug.augmentables.lines",
          "imgaug.augmentables.segmaps")  # fmt: skip


class _Missing:
    """Stands for a class of a package that is not installed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("this augmentation needs the package imgaug, which is not installed")


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing


def prepare_imports() -> None:
    """Import mmdet, without imgaug where there is none, and make `mmseg::` configurations findable."""
    if "mmdet.datasets" not in sys.modules and find_spec("mmdet") is not None:
        names = IMGAUG if find_spec("imgaug") is None else ()
        # only for as long as mmdet imports it: others ask whether imgaug is there
        sys.modules.update((name, _StandIn(name)) for name in names)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that it does without OneDL
                importlib.import_module("mmdet.datasets")
        finally:
            for name in names:
                del sys.modules[name]
    try:
        distribution("mmsegmentation")
    except PackageNotFoundError:
        from mmengine.config.utils import MODULE2PACKAGE

        MODULE2PACKAGE["mmseg"] = "mmseg"
