"""Our backbones beside mmdet's, mmseg's and timm's on images as detectors and segmentors take them: time and memory.

    python -m benchmarks.dense --out dense.json
    python -m benchmarks.dense --device cuda --dtype bfloat16 --batch 2

As in `peers`, all competitors of a row live in one process, have the same weights, are first seen to compute the same
maps and gradients, and are then timed in turn. A row is a backbone, an image size and a mode: `forward` under
`inference_mode()`, or `backward`, which is forward and backward from given gradients of the maps, without an update.
Weights are float32; other types are autocast's. Frameworks that are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvt_backbones.errors import ArgumentParser, exit_on_input_error

from . import measure
from .command_line import DTYPES, add_measuring, known_models, prepare
from .competitors import check_equal, with_attention
from .dense_competitors import MODELS, build_competitors

MODES = ("forward", "backward")
SIZES = ((800, 1216), (512, 512))
OURS = ("hvt", "HVTBackbone")


@dataclass(frozen=True)
class Settings:
    """What all competitors of a row share."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    rounds: int
    warmup: int
    clock: measure.Clock
    attention: tuple[str, ...] = ()

    def autocast(self):
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def forward(prototype: nn.Module, images: Tensor, settings: Settings) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device)
    model.eval()

    def call() -> None:
        with torch.inference_mode(), settings.autocast():
            model(images)

    return call


def forward_and_backward(
    prototype: nn.Module, images: Tensor, cotangents: Sequence[Tensor], settings: Settings
) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device)
    model.train()

    def call() -> None:
        with settings.autocast():
            maps = model(images)
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        torch.autograd.backward(maps, [y.to(x.dtype) for x, y in zip(maps, cotangents, strict=True)])
        model.zero_grad(set_to_none=True)

    return call


def measure_model(
    name: str, image_size: tuple[int, int], modes: Sequence[str], settings: Settings
) -> Iterator[dict[str, Any]]:
    """One row per mode: times and peak memory of all competitors."""
    torch.manual_seed(0)
    checked_size = MODELS[name].checked_size(image_size)
    errors = check_equal(
        add_attention(build_competitors(name, checked_size)[0], settings),
        torch.randn(1, 3, *checked_size).to(settings.device),
        limit=error_limit(),
        reference="hvt",
    )
    prototypes, missing = build_competitors(name, image_size)
    add_attention(prototypes, settings)
    images = torch.randn(settings.batch, 3, *image_size).to(settings.device)
    model = prototypes["hvt"]
    shapes = [
        (channels, *(side // stride for side in image_size))
        for channels, stride in zip(model.channels, model.strides, strict=True)
    ]
    for mode, best, figures in measure_modes(prototypes, images, shapes, modes, settings):
        yield {
            "model": name,
            "image_size": list(image_size),
            "mode": mode,
            "batch": settings.batch,
            "peer_best": best,
            "missing": missing,
            "competitors": {key: {**entry, "error_to_hvt": errors[key]} for key, entry in figures.items()},
        }


def add_attention(prototypes: dict[str, nn.Module], settings: Settings) -> dict[str, nn.Module]:
    """Ours under the implementations of `--attention`, in place."""
    prototypes |= with_attention(prototypes["hvt"], settings.attention)
    return prototypes


def error_limit() -> float:
    """How far maps and gradients of competitors may differ: float32's rounding, or that of tf32."""
    return 1e-4 if torch.get_float32_matmul_precision() == "highest" else 2e-2


def measure_modes(
    prototypes: Mapping[str, nn.Module],
    images: Tensor,
    shapes: Sequence[Sequence[int]],
    modes: Sequence[str],
    settings: Settings,
) -> Iterator[tuple[str, str | None, dict[str, dict[str, Any]]]]:
    """Times and peak memory of all competitors, mode by mode.

    Args:
        shapes: of the maps of one image, to which the gradients are given.

    Yields:
        The mode, the fastest peer, None where there is no peer, and name -> figures.
    """
    cotangents = [torch.randn(settings.batch, *shape).to(settings.device) for shape in shapes]
    rivals = [key for key in prototypes if key not in OURS and not key.startswith("hvt-")]
    for mode in modes:

        def build(key: str, mode: str = mode) -> measure.Work:
            if mode == "forward":
                return forward(prototypes[key], images, settings)
            return forward_and_backward(prototypes[key], images, cotangents, settings)

        memory = {key: measure.peak_memory(lambda key=key: build(key), settings.device) for key in prototypes}
        works = {key: build(key) for key in prototypes}
        samples = measure.interleave(works, settings.clock, rounds=settings.rounds, warmup=settings.warmup)
        del works  # the models of this mode, before those of the next
        best, figures = measure.compare(samples, memory, rivals or ["hvt"], "peer")
        yield mode, best if rivals else None, figures


def table(report: dict[str, Any]) -> str:
    header = (
        "model", "image", "mode", "competitor", "median ms", "min", "IQR", "x peer best", "(quartiles)", "peak MiB",
        "x peer",
    )  # fmt: skip
    rated = "matmul_rate" in report
    lines = [(*header, "of rate") if rated else header]
    for row in report["rows"]:
        for name, entry in row["competitors"].items():
            low, high = entry["ratio_quartiles"]
            lines.append(
                (
                    row["model"],
                    "x".join(map(str, row["image_size"])),
                    row["mode"],
                    name + (" *" if name == row["peer_best"] else ""),
                    *(f"{1e3 * entry[key]:.1f}" for key in ("median_s", "min_s", "iqr_s")),
                    f"{entry['ratio_to_peer_best']:.3f}",
                    f"({low:.3f}-{high:.3f})",
                    f"{entry['peak_bytes'] / 2**20:.1f}",
                    f"{entry['memory_ratio_to_peer_lowest']:.3f}",
                    *([f"{entry['fraction_of_matmul_rate']:.1%}"] if rated else []),
                )
            )
    return measure.aligned(lines, left=4)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if not height or not width or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(f"{text!r} must be HEIGHTxWIDTH, both multiples of 32, such as 800x1216")
    return height, width


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.dense", description="Compare our backbones with mmdet's, mmseg's and timm's."
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=list(SIZES), metavar="HxW", help="of the images: 800x1216 512x512"
    )
    add_measuring(parser, batch=1, rounds=10)
    options = parser.parse_args(argv)
    known_models(options.models, MODELS)
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    return compare_all("dense", parse(argv), argv, measure_model)


def compare_all(
    benchmark: str,
    options: argparse.Namespace,
    argv: Sequence[str] | None,
    measure_model: Callable[[str, tuple[int, ...], Sequence[str], Settings], Iterator[dict[str, Any]]],
) -> int:
    """Measure all models at all sizes, write the report after each row, and print it; the exit status.

    Where rows have "flops", the rate of a large matrix product is measured beside each, and the fraction of it that
    every competitor reaches is reported.
    """
    device = prepare(options)
    settings = Settings(
        device=device,
        dtype=DTYPES[options.dtype],
        batch=options.batch,
        rounds=options.rounds,
        warmup=options.warmup,
        clock=measure.Clock(device, options.clock),
        attention=tuple(options.attention),
    )
    command = [f"python -m benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "command": " ".join(command),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": measure.machine(device),
        "rows": [],
        "failures": [],
    }

    def save() -> None:
        if options.out is not None:
            measure.write_json(options.out, report)

    for name in options.models:
        for size in options.sizes:
            label = f"{name} {'x'.join(map(str, size))}"
            try:
                for row in measure_model(name, size, options.modes, settings):
                    report["rows"].append(row)
                    if "flops" in row:
                        measure.add_rate(report, device, settings.dtype)
                    print(f"{label} {row['mode']}: done", file=sys.stderr)
                    save()
            except Exception as error:  # the other rows are wanted too
                traceback.print_exc()
                report["failures"].append(f"{label}: {type(error).__name__}: {error}")
                save()
    print(report["command"])
    print(measure.heading(report))
    print(table(report))
    print("* the fastest peer. Ratios are medians of the ratios within a round: below 1 is faster.")
    for missing in sorted({name for row in report["rows"] for name in row["missing"]}):
        print(f"left out, not installed: {missing}")
    for failure in report["failures"]:
        print(f"FAILED {failure}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
