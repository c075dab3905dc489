"""Parameters and FLOPs of a segmentor: `python -m segmentation.info CONFIG`."""

from runner import shared_command

from .zoo import SEGMENTATION

main = shared_command("info", SEGMENTATION)

if __name__ == "__main__":
    raise SystemExit(main())
