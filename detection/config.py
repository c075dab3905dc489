"""The whole configuration of a detector: `python -m detection.config CONFIG`, and a table of them: `--tables`."""

from runner import shared_command

from .zoo import DETECTION

main = shared_command("config", DETECTION)

if __name__ == "__main__":
    raise SystemExit(main())
