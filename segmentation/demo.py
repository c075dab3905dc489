"""`python -m segmentation.demo`: see `demos/segmentation.py`."""

import sys

from demos.segmentation import main

if __name__ == "__main__":
    sys.exit(main())
