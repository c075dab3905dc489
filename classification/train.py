"""Train an image classifier: `python -m classification.train RECIPE [--key value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .signals import LostContactError, StoppedError, interrupted_at_once

if TYPE_CHECKING:
    from .config import Config


def train(config: Config) -> dict[str, Any]:
    """Train as `config` says; returns the contents of `metrics.json`, or, with `train.benchmark_steps`, the speeds."""
    from .benchmark import measure
    from .trainer import Trainer

    trainer = Trainer(config)
    return measure(trainer) if config.train.benchmark_steps else trainer.run()


def run(argv: Sequence[str] | None) -> int:
    from hvt_backbones.processes import leave_processes

    from .command_line import parse_command_line
    from .trainer import DivergedError

    try:
        train(parse_command_line(argv))
    except StoppedError as stopped:
        say(f"stopped by {stopped}; --resume auto goes on")
        return stopped.status
    except (DivergedError, LostContactError) as error:
        say(f"error: {error}")
        return 1
    finally:
        leave_processes()
    return 0


def say(message: str) -> None:
    """On stderr, with the rank where there are several processes."""
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(rank + message, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    with interrupted_at_once():
        from hvt_backbones.errors import exit_on_input_error

        from . import benchmark  # noqa: F401  and all that it imports

    return exit_on_input_error(run)(argv)


if __name__ == "__main__":
    sys.exit(main())
