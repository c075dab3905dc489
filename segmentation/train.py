"""Train a segmentor: `python -m segmentation.train CONFIG`."""

from runner import shared_command

from .zoo import SEGMENTATION

main = shared_command("train", SEGMENTATION)

if __name__ == "__main__":
    raise SystemExit(main())
