"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hvt_backbones.atomic import whole_file
from hvt_backbones.plots import BLUE, GREEN, INK, MUTED, ORANGE, new_figure, style


def plot_curves(history: Sequence[Mapping[str, float]], path: Path, *, title: str) -> None:
    """Write loss, accuracy (of a classifier) and learning rate over the epochs as a PNG.

    Args:
        history: one row per epoch, the columns of `log.csv`.
        path: the picture; replaced whole.
        title: above the panels.
    """
    epochs = [row["epoch"] for row in history]

    def column(name: str) -> list[float]:
        return [row[name] for row in history]

    marker = {"marker": "o", "markersize": 3.5} if len(history) <= 40 else {}
    figure = new_figure(13, 4.2, title)
    named = "top1" in history[-1]
    loss, *between, rate = figure.subplots(1, 3 if named else 2)

    loss.plot(epochs, column("train_loss"), color=BLUE, label="training (augmented)", **marker)
    loss.plot(epochs, column("val_loss"), color=ORANGE, label="held-out", **marker)
    loss.set_title("Cross-entropy" if named else "Absolute error of hidden pixels")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)

    for accuracy in between:
        accuracy.plot(epochs, column("top5"), color=GREEN, label="top-5", **marker)
        accuracy.plot(epochs, column("top1"), color=ORANGE, label="top-1", **marker)
        best = max(history, key=lambda row: row["top1"])
        accuracy.scatter([best["epoch"]], [best["top1"]], s=70, facecolors="none", edgecolors=INK, zorder=3)
        accuracy.annotate(
            f"best {best['top1']:.2f} % (epoch {best['epoch']:.0f})",
            (best["epoch"], best["top1"]),
            xytext=(0.97, 0.3),
            textcoords="axes fraction",
            ha="right",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": MUTED, "shrinkB": 5},
        )
        accuracy.set_title("Held-out accuracy, %")
        accuracy.set_ylim(top=101)
        accuracy.legend(frameon=False, loc="lower right")

    rate.plot(epochs, column("lr"), color=BLUE, **marker)
    rate.set_title("Learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    for axes in (loss, *between, rate):
        style(axes, "epoch")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
