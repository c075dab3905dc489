"""What tells one application of OpenMMLab's frameworks from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .zoo import Zoo


def _as_it_is(cfg: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Application:
    """
    Attributes:
        name: of the package of commands: "detection".
        scope: of the framework: "mmdet", "mmseg" or "mmaction".
        configs: the folder of recipes and of the demo.
        zoo: the configurations, by name.
        layout: of the standard data set, in words.
        amp_part: the submodule that bf16 is for, "" for the whole model.
        shape: (height, width) at which FLOPs are published; of a video (frames, height, width).
        adapt: changes a configuration that was read, for train and test.
    """

    name: str
    scope: str
    configs: Path
    zoo: Zoo
    layout: str
    amp_part: str
    shape: tuple[int, ...]
    adapt: Callable[[Any], None] = _as_it_is
