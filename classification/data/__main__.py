"""`python -m classification.data`: see `report`."""

import sys

from .report import main

if __name__ == "__main__":
    sys.exit(main())
