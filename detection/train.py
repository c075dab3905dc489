"""Train a detector: `python -m detection.train CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import DETECTION

main = command("train", DETECTION)

if __name__ == "__main__":
    sys.exit(main())
