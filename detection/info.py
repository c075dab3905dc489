"""Parameters and FLOPs of a detector: `python -m detection.info CONFIG`."""

from runner import shared_command

from .zoo import DETECTION

main = shared_command("info", DETECTION)

if __name__ == "__main__":
    raise SystemExit(main())
