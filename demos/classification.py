"""`make demo`: train the recipe `digits`, validate what it saved, predict held-out pictures, draw the results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from classification import validate
from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.data.loading import data_root
from classification.train import train
from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import exit_on_input_error

OUTPUT = Path("outputs/demo")
PREDICTIONS = "predictions.png"
REQUIRED_TOP1 = 97.0
COLUMNS, ROWS = 12, 5
INK, MUTED, WRONG = "#222222", "#777777", "#c8321f"


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Arguments are those of the trainer, after its recipe. Exits with 1 where the three commands disagree."""
    given = sys.argv[1:] if argv is None else argv
    config = parse_command_line(["digits", "--output-dir", str(OUTPUT), "--overwrite", *given])
    folder = checkpoint.run_folder(config.output)
    data = data_root(config.data)
    weights = folder / checkpoint.BEST_WEIGHTS
    start = time.perf_counter()
    trained = train(config)["best"]

    print(f"\n$ python -m classification.validate {weights} --data-dir {data}")
    validated = validate.validate(validate.build_parser().parse_args([str(weights), "--data-dir", str(data)]))

    pictures = sorted((data / config.data.val_split).glob("*/*.png"))
    print(f"\n$ hvt predict {weights} {data / config.data.val_split}   # {len(pictures)} pictures")
    predictions = predict(weights, pictures)
    right = sum(guess["top"][0]["name"] == path.parent.name for path, guess in predictions)
    print(f"{right} of {len(predictions)} right; for example")
    for path, guess in predictions[:: len(predictions) // 3][:3]:
        likely = [f"{top['name']} ({100 * top['probability']:.1f} %)" for top in guess["top"][:3]]
        print(f"  {path}: {', '.join(likely)}")
    draw_predictions(predictions, folder / PREDICTIONS)

    failures = []
    if not trained["val_correct"] == validated["correct"] == right:
        failures.append(
            f"the commands disagree: {trained['val_correct']} right in training, {validated['correct']} in validate, "
            f"{right} in predict"
        )
    if validated["top1"] < REQUIRED_TOP1:
        failures.append(f"top-1 {validated['top1']:.2f} % is below {REQUIRED_TOP1} %")
    for failure in failures:
        print(f"demo failed: {failure}", file=sys.stderr)
    if failures:
        return 1
    print(
        f"\ntop-1 {validated['top1']:.2f} % on {validated['images']} held-out pictures, the same in training, "
        f"validate and predict; {time.perf_counter() - start:.0f} s in all. In {folder}:\n"
        f"  {checkpoint.BEST_WEIGHTS:<24} the checkpoint\n"
        f"  {checkpoint.CURVES:<24} loss, accuracy and learning rate\n"
        f"  {PREDICTIONS:<24} held-out pictures with what was predicted"
    )
    return 0


def predict(weights: Path, pictures: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """(picture, result of `hvt predict --json`) for each picture."""
    command = [sys.executable, "-m", "hvt_backbones", "predict", str(weights), *map(str, pictures), "--json"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return list(zip(pictures, json.loads(output)["predictions"], strict=True))


def draw_predictions(predictions: Sequence[tuple[Path, dict[str, Any]]], target: Path) -> None:
    """Write a grid of pictures with prediction and truth: all mistakes first, then an even choice of the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wrong = [item for item in predictions if item[1]["top"][0]["name"] != item[0].parent.name]
    right = [item for item in predictions if item[1]["top"][0]["name"] == item[0].parent.name]
    shown = wrong[: COLUMNS * ROWS]
    places = COLUMNS * ROWS - len(shown)
    shown = shown + [right[round(i * (len(right) - 1) / max(places - 1, 1))] for i in range(min(places, len(right)))]

    figure = Figure(figsize=(COLUMNS * 0.95, ROWS * 1.3 + 0.75), facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"Held-out digits: {len(right)} of {len(predictions)} right",
        x=0.015,
        y=0.985,
        ha="left",
        va="top",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.015,
        0.925,
        "prediction and its probability under each picture; mistakes come first, framed, with the truth",
        va="top",
        fontsize=10,
        color=MUTED,
    )
    grid = figure.add_gridspec(ROWS, COLUMNS, left=0.015, right=0.985, bottom=0.055, top=0.87, wspace=0.12, hspace=0.45)
    for place, (path, guess) in enumerate(shown):
        axes = figure.add_subplot(grid[divmod(place, COLUMNS)])
        with Image.open(path) as picture:
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set(xticks=[], yticks=[])
        top, truth = guess["top"][0], path.parent.name
        mistake = top["name"] != truth
        for spine in axes.spines.values():
            spine.set(visible=mistake, color=WRONG, linewidth=3)
        label = f"{top['name']}, not {truth}" if mistake else top["name"]
        below: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, -0.17, label, fontsize=10, color=WRONG if mistake else INK, fontweight="bold", **below)
        axes.text(0.5, -0.33, f"{100 * top['probability']:.0f} %", fontsize=8, color=MUTED, **below)
    with whole_file(target) as path:
        figure.savefig(path, dpi=120)
