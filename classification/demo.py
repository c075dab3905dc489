"""`make demo` and `python -m classification.demo`: see `demos/classification.py`."""

import sys

from demos.classification import main

if __name__ == "__main__":
    sys.exit(main())
