"""Train a segmentor: `python -m segmentation.train CONFIG`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvt_backbones.openmmlab_commands import run_command


def run(argv: Sequence[str] | None) -> None:
    from hvt_backbones.openmmlab_commands.run import train

    from .application import SEGMENTATION

    train(argv, SEGMENTATION)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
