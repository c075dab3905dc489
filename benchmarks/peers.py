"""Our models beside timm's and torchvision's: time, share of the matrix-product rate, and peak training memory.

    python -m benchmarks.peers --out peers.json
    python -m benchmarks.peers --device cuda --dtype bfloat16 --batch 128

All competitors of a row live in one process, have the same weights, are first seen to give the same outputs and
gradients, and are then timed in turn, see `measure.interleave`. timm is measured as it comes and with its fused
attention switched the other way where a model has it; the faster of the two is timm's best.

Stochastic depth and dropout are off: they would give each competitor random work of its own, and leave no outputs to
compare. Inference runs with weights and images of `--dtype`; a training step keeps float32 weights and uses autocast.
"""

from __future__ import annotations

import argparse
import copy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvt_backbones.errors import ArgumentParser, InputError, exit_on_input_error, whole_number

from . import measure
from .command_line import DTYPES, add_measuring, known_models, prepare
from .competitors import CLASSES, MODELS, build_competitors, check_equal, count_flops

MODES = ("inference", "train")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, foreach=True),
}


@dataclass(frozen=True)
class Settings:
    """What all competitors of a row share."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    image_size: int
    rounds: int
    warmup: int
    optimizer: str
    attention: tuple[str, ...]
    clock: measure.Clock


def inference(prototype: nn.Module, images: Tensor, settings: Settings) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device, settings.dtype).eval()
    images = images.to(settings.dtype)

    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def training_step(prototype: nn.Module, images: Tensor, targets: Tensor, settings: Settings) -> measure.Work:
    """Forward, cross entropy, backward, one update by the optimizer's foreach form, gradients freed."""
    model = copy.deepcopy(prototype).to(settings.device).train()
    optimizer = OPTIMIZERS[settings.optimizer](model.parameters())
    reduced = settings.dtype != torch.float32

    def call() -> None:
        with torch.autocast(settings.device.type, settings.dtype) if reduced else nullcontext():
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def measure_model(name: str, modes: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """One row per mode: times of all competitors, and of a training step also their peak memory."""
    torch.manual_seed(0)
    device, size = settings.device, settings.image_size
    prototypes = build_competitors(name, settings.attention)
    images = torch.randn(settings.batch, 3, size, size).to(device)
    targets = torch.randint(CLASSES, (settings.batch,)).to(device)
    full_precision = torch.get_float32_matmul_precision() == "highest"
    errors = check_equal(prototypes, images[:1], limit=1e-4 if full_precision else 2e-2)
    flops = count_flops(name, size)

    for mode in modes:
        memory: dict[str, int] = {}
        if mode == "train":
            for key, prototype in prototypes.items():

                def build(prototype: nn.Module = prototype) -> measure.Work:
                    return training_step(prototype, images, targets, settings)

                memory[key] = measure.peak_memory(build, device)
            works = {key: training_step(one, images, targets, settings) for key, one in prototypes.items()}
        else:
            works = {key: inference(one, images, settings) for key, one in prototypes.items()}
        samples = measure.interleave(works, settings.clock, rounds=settings.rounds, warmup=settings.warmup)
        del works  # the models of this mode, before those of the next
        yield {
            "model": name,
            "mode": mode,
            "image_size": size,
            "batch": settings.batch,
            **summarise(samples, memory, errors, flops[mode] * settings.batch, settings.batch),
        }


def summarise(
    samples: Mapping[str, Sequence[float]],
    memory: Mapping[str, int],
    errors: Mapping[str, float],
    flops: int,
    batch: int,
) -> dict[str, Any]:
    """The figures of one row, per competitor; ratios are to the fastest of timm's, of memory to timm's lowest."""
    timms = [name for name in samples if name.startswith("timm")]
    best, figures = measure.compare(samples, memory, timms, "timm")
    for name, entry in figures.items():
        entry["images_per_s"] = batch / entry["median_s"]
        entry["error_to_timm"] = errors[name]
        if memory:
            entry["peak_training_bytes"] = entry.pop("peak_bytes")
    return {"flops": flops, "timm_best": best, "competitors": figures}


def table(report: dict[str, Any]) -> str:
    header = (
        "model", "mode", "competitor", "median ms", "min", "IQR", "x timm best", "(quartiles)", "images/s", "of rate",
        "peak MiB", "x timm",
    )  # fmt: skip
    lines = [header]
    for row in report["rows"]:
        for name, entry in row["competitors"].items():
            low, high = entry["ratio_quartiles"]
            memory = entry.get("peak_training_bytes")
            lines.append(
                (
                    row["model"],
                    row["mode"],
                    name + (" *" if name == row["timm_best"] else ""),
                    *(f"{1e3 * entry[key]:.2f}" for key in ("median_s", "min_s", "iqr_s")),
                    f"{entry['ratio_to_timm_best']:.3f}",
                    f"({low:.3f}-{high:.3f})",
                    f"{entry['images_per_s']:.1f}",
                    f"{entry['fraction_of_matmul_rate']:.1%}",
                    f"{memory / 2**20:.1f}" if memory else "",
                    f"{entry['memory_ratio_to_timm_lowest']:.3f}" if memory else "",
                )
            )
    return measure.aligned(lines, left=3)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.peers", description="Compare our models with timm's and torchvision's."
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    add_measuring(parser, batch=4, rounds=15)
    parser.add_argument("--image-size", type=whole_number(1), help="default: 224, for SwinV2 256")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of the training step")
    options = parser.parse_args(argv)
    known_models(options.models, MODELS)
    for name in options.models:
        size, multiple = options.image_size, MODELS[name].multiple
        if size is not None and size % multiple:
            raise InputError(f"--image-size {size} does not suit {name}: give a multiple of {multiple}")
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device = prepare(options)
    dtype = DTYPES[options.dtype]

    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": measure.machine(device),
        "matmul_rate": measure.matmul_rate(device, dtype, kind=options.clock),
        "rows": [],
        "failures": [],
    }

    def save() -> None:
        if options.out is not None:
            measure.write_json(options.out, report)

    for name in options.models:
        settings = Settings(
            device=device,
            dtype=dtype,
            batch=options.batch,
            image_size=options.image_size or MODELS[name].image_size,
            rounds=options.rounds,
            warmup=options.warmup,
            optimizer=options.optimizer,
            attention=tuple(options.attention),
            clock=measure.Clock(device, options.clock),
        )
        try:
            for row in measure_model(name, options.modes, settings):
                report["rows"].append(row)
                measure.add_rate(report, device, dtype)
                print(f"{row['model']} {row['mode']}: done", file=sys.stderr)
                save()
        except InputError:
            raise
        except Exception as error:  # the rows of the other models are wanted too
            traceback.print_exc()
            report["failures"].append(f"{name}: {type(error).__name__}: {error}")
            save()
    print(measure.heading(report))
    print(table(report))
    print("* timm's best. Ratios are medians of the ratios within a round: below 1 is faster.")
    for failure in report["failures"]:
        print(f"FAILED {failure}")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
