"""Train an image classifier: `python -m classification.train RECIPE [--key value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config


def train(config: Config) -> dict[str, Any]:
    """Train as `config` says; returns the contents of `metrics.json`, or, with `train.benchmark_steps`, the speeds."""
    from .performance import measure
    from .trainer import Trainer

    trainer = Trainer(config)
    return measure(trainer) if config.train.benchmark_steps else trainer.run()


def run(argv: Sequence[str] | None) -> int:
    from .command_line import parse_command_line
    from .engine import DivergedError
    from .parallel import LostContactError, leave
    from .stop import StoppedError

    try:
        train(parse_command_line(argv))
    except StoppedError as stopped:
        say(f"stopped by {stopped}; --resume auto goes on")
        return stopped.status
    except (DivergedError, LostContactError) as error:
        say(f"error: {error}")
        return 1
    finally:
        leave()
    return 0


def say(message: str) -> None:
    """On stderr, with the rank where there are several processes."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(rank + message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    # imported here, so that Ctrl-C during the seconds that PyTorch takes to load is no traceback either
    try:
        from hvt_backbones.errors import exit_on_input_error

        return exit_on_input_error(run)(argv)
    except KeyboardInterrupt:
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
