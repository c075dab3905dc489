"""The demos of detection, segmentation and video: data is drawn, a backbone is pretrained, and a model trained from it.

For detection and segmentation once more from scratch, at the same budget, to show what pretraining is worth.
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

from classification import train as trainer
from hvt_backbones.errors import ArgumentParser
from runner import patches
from runner.application import Application
from runner.config import building, open_config
from runner.devices import use_device
from runner.run import make_folder, write_json

from .shapes import write_crops

PRETRAINED, SCRATCH = "pretrained", "from scratch"
INK, MUTED, COLORS = "#222222", "#777777", {PRETRAINED: "#2f6fb2", SCRATCH: "#d9722e"}
TRAIN, VAL = 160, 60  # pictures
TRAIN_CROPS, VAL_CROPS = 400, 40  # of each class
# of each class and of the pretraining with --quick: 160 steps of 32, enough to see whether a backbone learns
QUICK_CROPS, QUICK_EPOCHS = 160, 4
CLASSIFIER = Path("pretrain/model_best.safetensors")  # in the working folder
LEAD = 0.05  # least distance of the pretrained model's values from those of the one from scratch


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A metric that has to be reached, or not to be exceeded.

    Attributes:
        name: as it is shown.
        key: as MMEngine calls it.
        required: of the pretrained model, from 0 to 1.
        quick: the same with `--quick`; None for no demand.
        at_most: whether it must not be exceeded.
        unit: of MMEngine's value: 1, or 0.01 for percent.
        chance: what guessing gives, to be shown.
    """

    name: str
    key: str
    required: float
    quick: float | None
    at_most: bool = False
    unit: float = 1.0
    chance: float | None = None

    def bound(self, quick: bool) -> float | None:
        return self.quick if quick else self.required


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What tells the demos of the applications from each other.

    Attributes:
        application: whose demo it is.
        method: what is trained, in words.
        config: of the training; beside it the recipe of the pretraining, `pretrain.yaml`.
        write_data: `write_data(folder, train=, val=)` draws so many pictures or clips, unless they are there.
        place_data: sets in a configuration where the data is.
        shorten: makes a configuration one of `--quick`.
        goals: what is to be reached.
        show: rows of pictures with the predictions of a runner's model.
        colors: of what is on them, RGB up to 255.
        data: what is drawn, in words.
        counts: how many to train on, and how many held out.
        quick_counts: the same with `--quick`.
        quick_pretraining: crops of each class, and epochs, of the pretraining with `--quick`.
        test: metrics of a trained runner's model, beside those of its last evaluation, or in their place.
        starts: the trainings; with `--quick` the first alone.
    """

    application: Application
    method: str
    config: Path
    write_data: Callable[..., Path]
    place_data: Callable[[Config, Path], None]
    shorten: Callable[[Config], None]
    goals: Sequence[Goal]
    show: Callable[[Runner], dict[str, list[NDArray]]]
    colors: Mapping[str, Sequence[int]]
    data: str = "pictures"
    counts: tuple[int, int] = (TRAIN, VAL)
    quick_counts: tuple[int, int] = (TRAIN, VAL)
    quick_pretraining: tuple[int, int] = (QUICK_CROPS, QUICK_EPOCHS)
    test: Callable[[Runner], Mapping[str, float]] | None = None
    starts: Sequence[str] = (PRETRAINED, SCRATCH)


def run_demo(argv: Sequence[str] | None, demo: Demo) -> int:
    """The command.

    Returns:
        1 where a goal is not reached, or pretraining did not help; what the pretraining ends with, unless that is 0.
    """
    args = _parse(argv, demo)
    name = demo.application.name
    make_folder("--work-dir", args.work_dir)
    print(f"1. drawing {demo.data}, and crops of others to pretrain on, in {args.data_dir}", flush=True)
    train, val = demo.quick_counts if args.quick else demo.counts
    folder = f"shapes_{name}" if (train, val) == demo.counts else f"shapes_{name}_{train}"
    data = demo.write_data(args.data_dir / folder, train=train, val=val)
    crop_count = demo.quick_pretraining[0] if args.quick else TRAIN_CROPS
    crops = write_crops(args.data_dir / f"shapes_crops_{crop_count}", train=crop_count, val=VAL_CROPS)
    recipe = demo.config.parent / "pretrain.yaml"
    print(f"2. pretraining the backbone as a classifier of the crops, by {os.path.relpath(recipe)}", flush=True)
    options = ["--data-dir", str(crops), "--output-dir", str(args.work_dir / CLASSIFIER.parent), "--overwrite"]
    options += ["--seed", str(args.seed), "--device", args.device]
    options += ["--epochs", str(demo.quick_pretraining[1])] if args.quick else []
    if status := trainer.main([str(recipe), *options]):
        return status
    patches.apply(demo.application.scope)
    use_device(args.device)
    trainings = []
    with quietly(args.work_dir / "log.txt") as say:
        for number, start in enumerate(demo.starts[:1] if args.quick else demo.starts, 3):
            say(f"{number}. training {demo.method}, {start}, by {os.path.relpath(demo.config)}")
            cfg = open_config(str(demo.config), {"randomness.seed": args.seed}, demo.application)
            demo.application.adapt(cfg)
            demo.place_data(cfg, data)
            cfg.model.backbone.pretrained = str(args.work_dir / CLASSIFIER) if start == PRETRAINED else False
            cfg.work_dir = str(args.work_dir / start.replace(" ", "_"))
            if args.quick:
                demo.shorten(cfg)
            trainings.append(fit(cfg, start, demo, say))
        draw_curves(args.work_dir / "curves.png", trainings, demo, args.quick)
        draw_grid(args.work_dir / "predictions.png", demo.show(trainings[0].runner), demo.colors)
    table, failures = verdict(trainings, demo.goals, args.quick)
    write_json(args.work_dir / "metrics.json", {training.start: training.result for training in trainings})
    evaluated = len(trainings[0].runner.val_dataloader.dataset)
    print(f"\non {evaluated} {demo.data} of the evaluation:\n{table}\n\nIn {args.work_dir}:")
    print(f"  predictions.png   {demo.data}, with the truth and what the pretrained model says")
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
    parser.add_argument(
        "--data-dir", type=Path, default=Path("outputs/data"), metavar="DIR", help=f"of the {demo.data}"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of weights and order; the {demo.data} are always the same"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="from pretrained weights alone, shorter, lower demands")
    return parser.parse_args(argv)


@dataclass(kw_only=True)
class Training:
    """What became of one training: the runner, (iteration, values of goals) at each evaluation, and those of a test."""

    start: str
    runner: Runner
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    tested: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def result(self) -> dict[str, float]:
        """The values of the last evaluation, and of the test."""
        return {**self.history[-1][1], **self.tested}


class _Watch(Hook):
    priority = "LOWEST"

    def __init__(self, training: Training, goals: Sequence[Goal], say: Callable[[str], None]) -> None:
        self.training, self.goals, self.say = training, goals, say

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        values = _values(self.goals, metrics)
        self.training.history.append((runner.iter, values))
        self.say(f"  iteration {runner.iter:>4} of {runner.max_iters}  {_line(values)}")


def _values(goals: Sequence[Goal], metrics: Mapping[str, float]) -> dict[str, float]:
    return {goal.name: metrics[goal.key] * goal.unit for goal in goals if goal.key in metrics}


def _line(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in values.items())


def fit(cfg: Config, start: str, demo: Demo, say: Callable[[str], None]) -> Training:
    """Train, evaluate and test as `cfg` says; each evaluation is a line."""
    begin = time.perf_counter()
    with building(cfg.filename):
        training = Training(start=start, runner=Runner.from_cfg(cfg))
    training.runner.register_hook(_Watch(training, demo.goals, say))
    training.runner.train()
    if demo.test is not None:
        training.tested = _values(demo.goals, demo.test(training.runner))
        say(f"  test  {_line(training.tested)}")
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
    if all(goal.chance is not None for goal in goals):
        lines.append(f"{'chance':<14}" + "".join(f"{goal.chance:>{width}.3f}" for goal in goals))
    bounds = [goal.bound(quick) for goal in goals]
    required = [
        "-" if bound is None else f"{'<= ' if goal.at_most else ''}{bound:.3f}"
        for goal, bound in zip(goals, bounds, strict=True)
    ]
    lines.append(f"{'required':<14}" + "".join(f"{one:>{width}}" for one in required))
    failures = []
    results = {training.start: training.result for training in trainings}
    for goal, bound in zip(goals, bounds, strict=True):
        value = results[PRETRAINED][goal.name]
        if bound is not None and not (value <= bound if goal.at_most else value >= bound):
            failures.append(f"{goal.name} {value:.3f} is {'above' if goal.at_most else 'below'} {bound}")
        if SCRATCH in results and not value - results[SCRATCH][goal.name] >= LEAD:
            scratch = results[SCRATCH][goal.name]
            failures.append(f"{goal.name} {value:.3f} is less than {LEAD} above the {scratch:.3f} from scratch")
    return "\n".join(lines), failures


def draw_curves(path: Path, trainings: Sequence[Training], demo: Demo, quick: bool) -> None:
    """Write each goal over the iterations, of all trainings, as a picture; what a test gave as a star."""
    figure = _figure(6 * len(demo.goals), 4)
    for goal, axes in zip(demo.goals, figure.subplots(1, len(demo.goals), squeeze=False)[0], strict=True):
        for training in trainings:
            color = COLORS[training.start]
            points = [(step, values[goal.name]) for step, values in training.history if goal.name in values]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=training.start)
            if goal.name in training.tested:
                end = training.history[-1][0], training.tested[goal.name]
                axes.plot(*end, color=color, marker="*", markersize=13, linestyle="", label=f"{training.start}, test")
        if (bound := goal.bound(quick)) is not None:
            axes.axhline(bound, color=MUTED, linestyle=":", label="at most" if goal.at_most else "required")
        if goal.chance is not None:
            axes.axhline(goal.chance, color=MUTED, linestyle="--", label="chance")
        axes.set_title(f"{goal.name}, {demo.data} of the evaluation", color=INK)
        axes.set_xlabel("iteration", color=MUTED)
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)


def draw_grid(path: Path, rows: Mapping[str, Sequence[NDArray]], colors: Mapping[str, Sequence[float]]) -> None:
    """Write rows of pictures, (H, W, 3) uint8 each, with the name of the row at its left and of colours below."""
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
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=100)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
