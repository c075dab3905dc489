"""Parameters and FLOPs of a detector: `python -m detection.info CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import DETECTION

main = command("info", DETECTION)

if __name__ == "__main__":
    sys.exit(main())
