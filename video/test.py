"""Evaluate a recognizer: `python -m video.test CONFIG CHECKPOINT`."""

from runner import shared_command

from .zoo import VIDEO

main = shared_command("test", VIDEO)

if __name__ == "__main__":
    raise SystemExit(main())
