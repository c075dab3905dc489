"""`python -m video.demo`: see `demos/video.py`."""

from demos.video import main

if __name__ == "__main__":
    raise SystemExit(main())
