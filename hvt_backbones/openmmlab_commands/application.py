"""What tells one application of OpenMMLab's frameworks from another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Application:
    """
    Attributes:
        name: of the package of commands: "detection".
        scope: of the framework: "mmdet" or "mmseg".
        configs: the folder of the shipped configurations.
        layout: of the standard data set, in words.
        amp_part: the submodule that bf16 is for, "" for the whole model.
        shape: (height, width) at which FLOPs are published.
    """

    name: str
    scope: str
    configs: Path
    layout: str
    amp_part: str
    shape: tuple[int, int]
