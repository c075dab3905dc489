"""Parameters and FLOPs of a recognizer: `python -m video.info CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import VIDEO

main = command("info", VIDEO)

if __name__ == "__main__":
    sys.exit(main())
