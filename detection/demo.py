"""`python -m detection.demo`: see `demos/detection.py`."""

import sys

from demos.detection import main

if __name__ == "__main__":
    sys.exit(main())
