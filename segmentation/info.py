"""Parameters and FLOPs of a segmentor: `python -m segmentation.info CONFIG`."""

from __future__ import annotations

import sys

from hvt_backbones.openmmlab_commands import command

from .application import SEGMENTATION

main = command("info", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
