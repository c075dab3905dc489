"""`python -m detection.demo`: see `demos/detection.py`."""

from demos.detection import main

if __name__ == "__main__":
    raise SystemExit(main())
