"""The demos of detection and segmentation: pictures are drawn, a backbone is pretrained, and a model trained from it.

And once more from scratch, at the same budget, to show what pretraining is worth.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from numpy.typing import NDArray

from hvt_backbones.errors import ArgumentParser
from hvt_backbones.shapes import write_crops

from .application import Application
from .checkpoints import guard_checkpoints
from .config import building, read_config
from .devices import use_device
from .run import make_folder, write_json
from .shims import prepare_imports

PRETRAINED, SCRATCH = "pretrained", "from scratch"
INK, MUTED, COLORS = "#222222", "#777777", {PRETRAINED: "#2f6fb2", SCRATCH: "#d9722e"}
TRAIN, VAL = 160, 60  # pictures
TRAIN_CROPS, VAL_CROPS = 400, 40  # of each class
QUICK_CROPS, QUICK_EPOCHS = 160, 4
LEAD = 0.05  # least distance of the pretrained model's values from those of the one from scratch


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A metric that has to be reached.

    Attributes:
        name: as it is shown.
        key: as MMEngine calls it.
        least: of the pretrained model, from 0 to 1.
        least_quick: the same with `--quick`.
        unit: of MMEngine's value: 1, or 0.01 for percent.
    """

    name: str
    key: str
    least: float
    least_quick: float
    unit: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What tells the demo of detection from that of segmentation.

    Attributes:
        application: whose demo it is.
        method: what is trained, in words.
        config: of the training.
        recipe: of the pretraining.
        write_data: `write_data(folder, train=, val=)` draws so many pictures, unless they are there.
        train_classifier: the command `classification.train`, given its arguments.
        place_data: sets in a configuration where the data is.
        shorten: makes a configuration one of `--quick`.
        goals: what is to be reached.
        show: rows of pictures with the predictions of a runner's model; colours of what is on them.
        colors: of those, RGB up to 255.
    """

    application: Application
    method: str
    config: Path
    recipe: Path
    write_data: Callable[..., Path]
    train_classifier: Callable[[list[str]], Any]
    place_data: Callable[[Config, Path], None]
    shorten: Callable[[Config], None]
    goals: Sequence[Goal]
    show: Callable[[Runner], dict[str, list[NDArray]]]
    colors: Mapping[str, Sequence[int]]


def run_demo(argv: Sequence[str] | None, demo: Demo) -> int:
    """The command; 1 where a goal is not reached, or pretraining did not help."""
    args = _parse(argv, demo)
    name = demo.application.name
    make_folder("--work-dir", args.work_dir)
    print(f"1. drawing pictures, and crops of others to pretrain on, in {args.data_dir}", flush=True)
    data = demo.write_data(args.data_dir / f"shapes_{name}", train=TRAIN, val=VAL)
    crop_count = QUICK_CROPS if args.quick else TRAIN_CROPS
    crops = write_crops(args.data_dir / f"shapes_crops_{crop_count}", train=crop_count, val=VAL_CROPS)
    print(f"2. pretraining the backbone as a classifier of the crops, by {_shown(demo.recipe)}", flush=True)
    weights = _pretrain(demo, crops, args)
    prepare_imports()
    guard_checkpoints()
    use_device(args.device)
    starts = {PRETRAINED: str(weights)} if args.quick else {PRETRAINED: str(weights), SCRATCH: False}
    trainings = []
    with quietly(args.work_dir / "log.txt") as say:
        for number, (start, pretrained) in enumerate(starts.items(), 3):
            say(f"{number}. training {demo.method}, {start}, by {_shown(demo.config)}")
            cfg = read_config(str(demo.config), {"randomness.seed": args.seed}, demo.application)
            demo.place_data(cfg, data)
            cfg.model.backbone.pretrained = pretrained
            cfg.work_dir = str(args.work_dir / start.replace(" ", "_"))
            if args.quick:
                demo.shorten(cfg)
            trainings.append(fit(cfg, start, demo.goals, say))
        draw_curves(args.work_dir / "curves.png", trainings, demo.goals, args.quick)
        draw_grid(args.work_dir / "predictions.png", demo.show(trainings[0].runner), demo.colors)
    table, failures = verdict(trainings, demo.goals, args.quick)
    write_json(args.work_dir / "metrics.json", {training.start: training.result for training in trainings})
    print(f"\non {VAL} held-out pictures:\n{table}\n\nIn {args.work_dir}:")
    print("  predictions.png   held-out pictures, with the truth and what the pretrained model says")
    print("  curves.png        the values during training")
    print("  log.txt           what MMEngine prints")
    for failure in failures:
        print(f"demo failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _parse(argv: Sequence[str] | None, demo: Demo) -> argparse.Namespace:
    name = demo.application.name
    parser = ArgumentParser(prog=f"python -m {name}.demo", description=__doc__)
    work_dir = Path(f"outputs/{name}_demo")
    parser.add_argument("--work-dir", type=Path, default=work_dir, metavar="DIR", help=f"default: {work_dir}")
    parser.add_argument("--data-dir", type=Path, default=Path("outputs/data"), metavar="DIR", help="of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; the pictures are always the same")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="from pretrained weights alone, shorter, lower demands")
    return parser.parse_args(argv)


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _pretrain(demo: Demo, crops: Path, args: argparse.Namespace) -> Path:
    """The checkpoint of a classifier."""
    folder = args.work_dir / "pretrain"
    options = ["--data-dir", str(crops), "--output-dir", str(folder), "--overwrite", "--seed", str(args.seed)]
    options += ["--device", args.device, *(["--epochs", str(QUICK_EPOCHS)] if args.quick else [])]
    demo.train_classifier([str(demo.recipe), *options])
    return folder / "model_best.safetensors"


@dataclass(kw_only=True)
class Training:
    """What became of one training: the runner, and (iteration, value of each goal) at each evaluation."""

    start: str
    runner: Runner
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def result(self) -> dict[str, float]:
        """The values of the last evaluation."""
        return self.history[-1][1]


class _Watch(Hook):
    priority = "LOWEST"

    def __init__(self, training: Training, goals: Sequence[Goal], say: Callable[[str], None]) -> None:
        self.training, self.goals, self.say = training, goals, say

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        values = {goal.name: metrics[goal.key] * goal.unit for goal in self.goals}
        self.training.history.append((runner.iter, values))
        shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        self.say(f"  iteration {runner.iter:>4} of {runner.max_iters}  {shown}")


def fit(cfg: Config, start: str, goals: Sequence[Goal], say: Callable[[str], None]) -> Training:
    """Train and evaluate as `cfg` says; each evaluation is a line."""
    begin = time.perf_counter()
    with building(cfg.filename):
        training = Training(start=start, runner=Runner.from_cfg(cfg))
    training.runner.register_hook(_Watch(training, goals, say))
    training.runner.train()
    training.seconds = time.perf_counter() - begin
    return training


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[Callable[[str], None]]:
    """What is printed goes to the file `log`, except through the function that this yields."""
    console = sys.stdout
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield lambda line: print(line, file=console, flush=True)


def verdict(trainings: Sequence[Training], goals: Sequence[Goal], quick: bool) -> tuple[str, list[str]]:
    """A table of results, and what is wrong with them."""
    width = 2 + max(len(goal.name) for goal in goals)
    lines = [f"{'':<14}" + "".join(f"{goal.name:>{width}}" for goal in goals)]
    for training in trainings:
        values = "".join(f"{training.result[goal.name]:>{width}.3f}" for goal in goals)
        lines.append(f"{training.start:<14}{values}   {training.seconds:.0f} s")
    lines.append(f"{'required':<14}" + "".join(f"{_least(goal, quick):>{width}.3f}" for goal in goals))
    failures = []
    results = {training.start: training.result for training in trainings}
    for goal in goals:
        value = results[PRETRAINED][goal.name]
        if not value >= _least(goal, quick):
            failures.append(f"{goal.name} {value:.3f} is below {_least(goal, quick)}")
        if SCRATCH in results and not value - results[SCRATCH][goal.name] >= LEAD:
            scratch = results[SCRATCH][goal.name]
            failures.append(f"{goal.name} {value:.3f} is less than {LEAD} above the {scratch:.3f} from scratch")
    return "\n".join(lines), failures


def _least(goal: Goal, quick: bool) -> float:
    return goal.least_quick if quick else goal.least


def draw_curves(path: Path, trainings: Sequence[Training], goals: Sequence[Goal], quick: bool) -> None:
    """Write each goal over the iterations, of all trainings, as a picture."""
    figure = _figure(6 * len(goals), 4)
    for goal, axes in zip(goals, figure.subplots(1, len(goals), squeeze=False)[0], strict=True):
        for training in trainings:
            steps, values = zip(*((step, result[goal.name]) for step, result in training.history), strict=True)
            axes.plot(steps, values, color=COLORS[training.start], marker="o", markersize=4, label=training.start)
        axes.axhline(_least(goal, quick), color=MUTED, linestyle=":", label="required")
        axes.set_title(f"{goal.name}, held-out pictures", color=INK)
        axes.set_xlabel("iteration", color=MUTED)
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def draw_grid(path: Path, rows: Mapping[str, Sequence[NDArray]], colors: Mapping[str, Sequence[float]]) -> None:
    """Write rows of pictures, (H, W, 3) uint8 each, with the name of the row at its left and of each colour below."""
    from matplotlib.patches import Patch

    columns = max(map(len, rows.values()))
    figure = _figure(2.2 * columns + 0.3, 2.2 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, pictures), line in zip(rows.items(), grid, strict=True):
        line[0].set_ylabel(name, color=INK, fontsize=12)
        for axes, picture in zip(line, pictures, strict=False):
            axes.imshow(picture)
        for axes in line:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    patches = [Patch(color=np.array(color) / 255, label=name) for name, color in colors.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
