"""The whole configuration of a recognizer: `python -m video.config CONFIG`, and a table of them: `--tables`."""

from runner import shared_command

from .zoo import VIDEO

main = shared_command("config", VIDEO)

if __name__ == "__main__":
    raise SystemExit(main())
