"""Train a recognizer: `python -m video.train CONFIG`."""

from runner import shared_command

from .zoo import VIDEO

main = shared_command("train", VIDEO)

if __name__ == "__main__":
    raise SystemExit(main())
