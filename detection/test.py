"""Evaluate a detector: `python -m detection.test CONFIG CHECKPOINT`."""

from runner import shared_command

from .zoo import DETECTION

main = shared_command("test", DETECTION)

if __name__ == "__main__":
    raise SystemExit(main())
