"""The whole configuration of a detector: `python -m detection.config CONFIG`, and a table of them: `--tables`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import DETECTION

main = command("config", DETECTION)

if __name__ == "__main__":
    sys.exit(main())
