"""`python -m demos.few_labels`: SimMIM without labels, then 5 % of them, beside the same training from scratch."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from accelerate.state import AcceleratorState

from classification.checkpoint.files import BEST_WEIGHTS
from classification.command_line import parse_command_line
from classification.train import train
from hvt_backbones.errors import exit_on_input_error, whole_number

OUTPUT = Path("outputs/few_labels")
FEW = ("--data.train_share", "0.05", "--batch-size", "20", "--train.ema_decay", "0")


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Exits with 1 where pre-training does not help on average."""
    parser = argparse.ArgumentParser(prog="python -m demos.few_labels", description=__doc__)
    parser.add_argument("--mnist", metavar="DIR", help="files of MNIST or Fashion-MNIST instead of the digits")
    parser.add_argument("--seeds", type=whole_number(1), default=3, metavar="N", help="of all (default 3)")
    parser.add_argument("--epochs", type=whole_number(2), default=40, metavar="N", help="with labels (default 40)")
    parser.add_argument(
        "--pretrain-epochs", type=whole_number(2), default=40, metavar="N", help="without labels (default 40)"
    )
    args = parser.parse_args(argv)
    data = ("--data.kind", "mnist", "--data-dir", args.mnist) if args.mnist else ()
    found: dict[str, list[float]] = {"from scratch": [], "after SimMIM": []}
    for seed in range(args.seeds):
        pretrained = OUTPUT / f"simmim_{seed}"
        _train("digits_simmim", seed, args.pretrain_epochs, pretrained, *data)
        weights = ("--model.pretrained", str(pretrained / BEST_WEIGHTS))
        for name, options in (("from scratch", ()), ("after SimMIM", weights)):
            folder = OUTPUT / f"{name.replace(' ', '_')}_{seed}"
            found[name].append(_train("digits", seed, args.epochs, folder, *FEW, *options, *data))
    print(f"\nheld-out top-1 (%) after {args.epochs} epochs with 5 % of the labels, seeds 0 to {args.seeds - 1}")
    for name, figures in found.items():
        spread = statistics.stdev(figures) if len(figures) > 1 else 0.0
        each = "  ".join(f"{figure:5.2f}" for figure in figures)
        print(f"{name:13}  {each}   mean {statistics.mean(figures):.2f}, standard deviation {spread:.2f}")
    return int(statistics.mean(found["after SimMIM"]) <= statistics.mean(found["from scratch"]))


def _train(recipe: str, seed: int, epochs: int, folder: Path, *options: str) -> float:
    """The last top-1 (0 without labels): the best would be chosen by the held-out pictures."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps the settings of a process's first run
    settings = ["--seed", str(seed), "--epochs", str(epochs), "--output-dir", str(folder), "--overwrite", *options]
    return train(parse_command_line([recipe, *settings]))["last"].get("top1", 0.0)


if __name__ == "__main__":
    raise SystemExit(main())
