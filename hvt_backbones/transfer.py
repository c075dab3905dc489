"""How a Swin or SwinV2 does in other windows than its own, without fine-tuning (arXiv:2111.09883, Table 1).

The images grow with the window, so that a window always sees the same part of them. Swin's position tables are resized
bicubically, SwinV2's network is asked for larger offsets, divided as in training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .atomic import whole_file
from .classifier import Classifier
from .errors import InputError
from .images import IMAGE_SUFFIXES, find_images
from .model_file import ModelFile
from .plots import BLUE, INK, MUTED, new_figure, style
from .predict import class_positions, image_batches
from .variants import find_variant
from .weights.position_windows import maps_at, windows_at


@dataclass(frozen=True)
class Transfer:
    """What a model does in one window.

    Attributes:
        window: side, in tokens, of the first stage's.
        image_size: (height, width) in pixels.
        top1: accuracy in percent.
        drop: how much less that is than in the model's own window, in percentage points.
        loss: mean cross-entropy.
    """

    window: int
    image_size: tuple[int, int]
    top1: float
    drop: float
    loss: float


def in_windows(model_file: ModelFile, windows: Iterable[int]) -> dict[int, ModelFile]:
    """First the model as it is, then with each of `windows`; its images and all its stages' windows scale alike.

    Returns:
        The side of the first stage's window -> the model; `classifier()` resizes or extrapolates its position biases.

    Raises:
        InputError: a model without such windows, or a window with which an image, a map or a window of another stage
            would have no whole side.
        WeightsError: weights without a head, whose accuracy nobody can tell.
    """
    model_file.check_head()
    variant = find_variant(model_file.name)[0]
    if variant.family not in ("swin", "swinv2"):
        raise InputError(
            f"{model_file.source} is a {variant.name}, which has no windows to change: give a Swin or SwinV2"
        )
    arch = variant.with_overrides(model_file.overrides)
    channels, *size = model_file.preprocessing.input_size
    present, maps = windows_at(arch, size), maps_at(arch, size)
    own = present[0][0]
    step = own // math.gcd(own, *size, *(side for shape in (*present, *maps) for side in shape))
    scaled = {}
    for window in dict.fromkeys((own, *windows)):
        if window % step:
            raise InputError(
                f"window {window}: {model_file.source} has window {own} on images of {shown_size(size)}; all its sides "
                f"stay whole at multiples of {step} alone: choose among these"
            )
        height, width = (side * window // own for side in size)
        sides = [tuple(side * window // own for side in shape) for shape in present]
        scaled[window] = replace(
            model_file,
            overrides={**model_file.overrides, "window_size": sides},
            preprocessing=replace(model_file.preprocessing, input_size=(channels, height, width)),
        )
    return scaled


def labelled_pictures(folder: Path, model_file: ModelFile) -> tuple[list[Path], Tensor]:
    """The pictures in a folder with a sub-folder for each class, and the model's number of each one's class, int64.

    Raises:
        InputError: no such folder, no sub-folders, pictures beside them, none in one, or names that are no classes.
    """
    expected = "expected one sub-folder of pictures per class"
    if not folder.is_dir():
        raise InputError(f"--data: folder {folder} does not exist or is not a folder; {expected}")
    children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    classes = [child for child in children if child.is_dir()]
    if any(child.suffix.lower() in IMAGE_SUFFIXES for child in children if child not in classes):
        raise InputError(f"--data: {folder} has pictures that lie in no class; {expected}")
    if not classes:
        raise InputError(f"--data: {folder} has no sub-folders; {expected}")
    names = model_file.class_names or [str(index) for index in range(model_file.num_classes)]
    positions = class_positions(names, [child.name for child in classes], model_file.source)
    pictures = [(path, positions[child.name]) for child in classes for path in find_images([child])]
    return [path for path, _ in pictures], torch.tensor([target for _, target in pictures])


@torch.inference_mode()
def evaluate(model: Classifier, batches: Iterable[Tensor], targets: Tensor) -> tuple[float, float]:
    """Top-1 accuracy in percent and mean cross-entropy of (B, C, H, W) batches with these targets, in order."""
    logits = torch.cat([model(batch).float().cpu() for batch in batches])
    right = logits.argmax(1) == targets
    return 100 * right.double().mean().item(), F.cross_entropy(logits, targets).item()


def transfer(
    models: Mapping[int, ModelFile], paths: Sequence[Path], targets: Tensor, device: torch.device
) -> Iterator[Transfer]:
    """What each of the models of `in_windows` makes of the pictures.

    Raises:
        InputError: a picture that cannot be read.
        WeightsError: weights that do not fit.
    """
    baseline = None
    for window, model_file in models.items():
        model, preprocessing = model_file.classifier().to(device), model_file.preprocessing
        top1, loss = evaluate(model, image_batches(paths, preprocessing, device), targets)
        baseline = top1 if baseline is None else baseline
        yield Transfer(window, preprocessing.input_size[1:], top1, baseline - top1, loss)


def shown_size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def row(found: Transfer | None = None) -> str:
    """A line of the table; its header without one."""
    cells: tuple[str, ...] = ("window", "image", "top-1 (%)", "drop", "loss")
    if found is not None:
        figures = f"{found.top1:.2f}", f"{found.drop:.2f}", f"{found.loss:.4f}"
        cells = str(found.window), shown_size(found.image_size), *figures
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, (6, 9, 9, 6, 8), strict=True))


def write_report(folder: Path, model_file: ModelFile, data: Path, found: Sequence[Transfer], pictures: int) -> None:
    """Write `transfer.json` and `transfer.png` into `folder`, each whole or not at all.

    Raises:
        InputError: they cannot be written.
    """
    rows = [asdict(one) | {"loss": one.loss if math.isfinite(one.loss) else None} for one in found]  # JSON has no NaN
    facts = {"checkpoint": model_file.source, "model": model_file.name, "data": str(data), "pictures": pictures}
    with whole_file(folder / "transfer.json") as path:
        path.write_text(json.dumps({**facts, "own_window": found[0].window, "windows": rows}, indent=2) + "\n")
    plot(folder / "transfer.png", found, title=f"{model_file.name} in other windows, without fine-tuning")


def plot(path: Path, found: Sequence[Transfer], *, title: str) -> None:
    """Write top-1 over the windows as a PNG; the first, the model's own, is ringed."""
    figure = new_figure(7, 4.2, title)
    axes = figure.subplots()
    ordered = sorted(found, key=lambda one: one.window)
    windows, top1 = [one.window for one in ordered], [one.top1 for one in ordered]
    axes.plot(windows, top1, color=BLUE, marker="o", markersize=5)
    axes.scatter([found[0].window], [found[0].top1], s=110, facecolors="none", edgecolors=INK, zorder=3)
    for one in ordered:
        axes.annotate(f"{one.top1:.2f}", (one.window, one.top1), (0, 9), textcoords="offset points", ha="center")
    style(axes, "window, image size in pixels")
    axes.set_xticks(windows, [f"{one.window}\n{shown_size(one.image_size)}" for one in ordered])
    axes.set_ylabel("top-1, %", color=MUTED)
    axes.margins(y=0.15)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
