"""Parameters and FLOPs of a segmentor: `python -m segmentation.info CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import SEGMENTATION

main = command("info", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
