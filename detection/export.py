"""Backbone and neck of a detector as one graph for other runtimes: `python -m detection.export --help`."""

from runner import shared_command

from .zoo import DETECTION

main = shared_command("export", DETECTION)

if __name__ == "__main__":
    raise SystemExit(main())
