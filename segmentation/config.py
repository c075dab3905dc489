"""The whole configuration of a segmentor: `python -m segmentation.config CONFIG`, and a table of them: `--tables`."""

from runner import shared_command

from .zoo import SEGMENTATION

main = shared_command("config", SEGMENTATION)

if __name__ == "__main__":
    raise SystemExit(main())
