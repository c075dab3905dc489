"""Train a segmentor: `python -m segmentation.train CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import SEGMENTATION

main = command("train", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
