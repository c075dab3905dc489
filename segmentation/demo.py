"""`python -m segmentation.demo`: see `demos/segmentation.py`."""

from demos.segmentation import main

if __name__ == "__main__":
    raise SystemExit(main())
