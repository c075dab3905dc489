"""Evaluate a segmentor: `python -m segmentation.test CONFIG CHECKPOINT`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import SEGMENTATION

main = command("test", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
