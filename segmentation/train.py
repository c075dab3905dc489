"""Train a segmentor: `python -m segmentation.train CONFIG`."""

from __future__ import annotations

import sys

from hvt_backbones.openmmlab_commands import command

from .application import SEGMENTATION

main = command("train", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
