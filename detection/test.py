"""Evaluate a detector: `python -m detection.test CONFIG CHECKPOINT`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import DETECTION

main = command("test", DETECTION)

if __name__ == "__main__":
    sys.exit(main())
