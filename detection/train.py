"""Train a detector: `python -m detection.train CONFIG`."""

from runner import shared_command

from .zoo import DETECTION

main = shared_command("train", DETECTION)

if __name__ == "__main__":
    raise SystemExit(main())
