"""Parameters and FLOPs of a recognizer: `python -m video.info CONFIG`."""

from runner import shared_command

from .zoo import VIDEO

main = shared_command("info", VIDEO)

if __name__ == "__main__":
    raise SystemExit(main())
