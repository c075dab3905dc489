"""`python -m video.demo`: see `demos/video.py`."""

import sys

from demos.video import main

if __name__ == "__main__":
    sys.exit(main())
