"""Backbone and neck of a segmentor as one graph for other runtimes: `python -m segmentation.export --help`."""

from runner import shared_command

from .zoo import SEGMENTATION

main = shared_command("export", SEGMENTATION)

if __name__ == "__main__":
    raise SystemExit(main())
