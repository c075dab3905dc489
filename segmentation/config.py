"""The whole configuration of a segmentor: `python -m segmentation.config CONFIG`, and a table of them: `--tables`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import SEGMENTATION

main = command("config", SEGMENTATION)

if __name__ == "__main__":
    sys.exit(main())
