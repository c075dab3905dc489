"""Train a recognizer: `python -m video.train CONFIG`."""

from __future__ import annotations

import sys

from runner import command

from .zoo import VIDEO

main = command("train", VIDEO)

if __name__ == "__main__":
    sys.exit(main())
