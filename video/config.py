"""The whole configuration of a recognizer: `python -m video.config CONFIG`, and a table of them: `--tables`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import VIDEO

main = command("config", VIDEO)

if __name__ == "__main__":
    sys.exit(main())
