"""`python -m hvt_backbones`: the same as `hvt`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
