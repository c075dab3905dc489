"""A recognizer of single clips as one graph for other runtimes: `python -m video.export --help`."""

from runner import shared_command

from .zoo import VIDEO

main = shared_command("export", VIDEO)

if __name__ == "__main__":
    raise SystemExit(main())
