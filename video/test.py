"""Evaluate a recognizer: `python -m video.test CONFIG CHECKPOINT`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import VIDEO

main = command("test", VIDEO)

if __name__ == "__main__":
    sys.exit(main())
