"""Evaluate a segmentor: `python -m segmentation.test CONFIG CHECKPOINT`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvt_backbones.openmmlab_commands import run_command


def run(argv: Sequence[str] | None) -> None:
    from hvt_backbones.openmmlab_commands.run import test

    from .application import SEGMENTATION

    test(argv, SEGMENTATION)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
