"""Evaluate a segmentor: `python -m segmentation.test CONFIG CHECKPOINT`."""

from runner import shared_command

from .zoo import SEGMENTATION

main = shared_command("test", SEGMENTATION)

if __name__ == "__main__":
    raise SystemExit(main())
