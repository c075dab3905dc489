"""What the comparisons with peers share: their command line, the order of the work, the report and its table."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvt_backbones.device import select_device
from hvt_backbones.errors import ArgumentParser, InputError, WeightsError, nearest, whole_number
from hvt_backbones.ops import IMPLEMENTATIONS

from . import measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all competitors of a row share."""

    device: torch.device
    dtype: torch.dtype
    clock: measure.Clock
    options: argparse.Namespace

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


# ---- the command line ----


def output_file(text: str) -> Path:
    path = Path(text)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: give a file in a folder that exists")
    return path


def command_line(
    benchmark: str, description: str, models: Iterable[str], modes: Sequence[str], *, batch: int, rounds: int
) -> ArgumentParser:
    """The arguments of every command that times competitors against each other."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{benchmark}", description=description)
    parser.add_argument("--models", nargs="+", default=list(models), metavar="NAME", help=", ".join(models))
    parser.add_argument("--modes", nargs="+", choices=modes, default=list(modes))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, npu or auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tf32", action="store_true", help="let CUDA round float32 factors to tf32; without it, never")
    parser.add_argument("--batch", type=whole_number(1), default=batch)
    parser.add_argument("--rounds", type=whole_number(1), default=rounds, help="samples of each competitor")
    parser.add_argument("--warmup", type=whole_number(1), default=2, help="rounds before, not kept")
    parser.add_argument("--threads", type=whole_number(1), help="of the CPU; default: torch's choice")
    parser.add_argument(
        "--clock", choices=("wall", "process"), default="wall",
        help="process: the processor time of all threads, on a CPU that others use too; best with --threads 1",
    )  # fmt: skip
    parser.add_argument(
        "--attention", nargs="+", choices=IMPLEMENTATIONS, default=[], metavar="NAME",
        help=f"also measure ours with these implementations of window attention: {', '.join(IMPLEMENTATIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=output_file, metavar="FILE", help="write all numbers there as JSON, after every row"
    )
    return parser


def parse(parser: ArgumentParser, argv: Sequence[str] | None, models: Iterable[str]) -> argparse.Namespace:
    """Raises:
    InputError: a name that is none of `models`.
    """
    options = parser.parse_args(argv)
    for name in options.models:
        if name not in models:
            raise InputError(f"no peers are known for {name!r}: {nearest(name, list(models))}")
    return options


def prepare(options: argparse.Namespace) -> Settings:
    """What was asked for, with threads and tf32 set.

    Raises:
        InputError: there is no such device, or an option is not for it.
    """
    device = select_device(options.device)
    if device.type != "cpu" and options.clock != "wall":
        raise InputError(f"--clock {options.clock} is for the CPU: leave it out with --device {options.device}")
    if options.tf32 and device.type != "cuda":
        raise InputError(f"--tf32 is for CUDA: leave it out with --device {options.device}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    return Settings(device, DTYPES[options.dtype], measure.Clock(device, options.clock), options)


# ---- the work ----


def compare_modes(
    prototypes: Mapping[str, nn.Module],
    works: Mapping[str, Callable[[nn.Module], measure.Work]],
    settings: Settings,
    *,
    rivals: Sequence[str],
    label: str,
    without_memory: Sequence[str] = (),
) -> Iterator[tuple[str, str, dict[str, Row]]]:
    """Times and peak memory of all competitors, mode by mode, those that were asked for.

    Args:
        prototypes: name -> model, to be copied, not run.
        works: mode -> what makes the work of a call from a prototype.
        rivals, label: as `measure.compare` takes them.
        without_memory: modes whose peak memory is not measured.

    Yields:
        The mode, the fastest rival, and name -> figures.
    """
    options = settings.options
    for mode in options.modes:
        build = works[mode]
        measured = {} if mode in without_memory else prototypes
        memory = {name: measure.peak_memory(partial(build, one), settings.device) for name, one in measured.items()}
        calls = {name: build(one) for name, one in prototypes.items()}
        samples = measure.interleave(calls, settings.clock, rounds=options.rounds, warmup=options.warmup)
        del calls  # the models of this mode, before those of the next
        yield mode, *measure.compare(samples, memory, rivals, label)


def compare_all(
    benchmark: str,
    label: str,
    options: argparse.Namespace,
    argv: Sequence[str] | None,
    measure_model: Callable[[str, Any, Settings], Iterator[Row]],
) -> int:
    """Measure all models at all sizes, write the report after each row, and print it; the exit status.

    Where rows have "flops", the rate of a large matrix product is measured beside each, and the fraction of it that
    every competitor reaches is reported.

    Args:
        label: what the rivals are called, "timm" or "peer".
        measure_model: gives the rows of a model at a size: one of `--sizes`, None without this option.
    """
    settings = prepare(options)
    report: Row = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "command": " ".join([f"python -m benchmarks.{benchmark}", *(sys.argv[1:] if argv is None else argv)]),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": measure.machine(settings.device),
        "rows": [],
        "failures": [],
    }

    def save() -> None:
        if options.out is not None:
            measure.write_json(options.out, report)

    for name in options.models:
        for size in getattr(options, "sizes", [None]):
            title = name if size is None else f"{name} {'x'.join(map(str, size))}"
            try:
                for row in measure_model(name, size, settings):
                    report["rows"].append(row)
                    if "flops" in row:
                        measure.add_rate(report, settings.device, settings.dtype)
                    print(f"{title} {row['mode']}: done", file=sys.stderr)
                    save()
            except Exception as error:  # the other rows are wanted too
                if isinstance(error, InputError) and not isinstance(error, WeightsError):
                    raise  # it is of all rows
                traceback.print_exc()
                report["failures"].append(f"{title}: {type(error).__name__}: {error}")
                save()
    print(report["command"])
    print(measure.heading(report))
    print(table(report["rows"], label))
    print("* the fastest, to which ratios are: medians of the ratios within a round, below 1 is faster.")
    for missing in sorted({name for row in report["rows"] for name in row.get("missing", ())}):
        print(f"left out, not installed: {missing}")
    for row in report["rows"]:
        for failed in row.get("failed", ()):
            print(f"left out: {row['model']} {row['mode']} {failed}")
    for failure in report["failures"]:
        print(f"FAILED {failure}")
    return 1 if report["failures"] else 0


def table(rows: Sequence[Row], label: str) -> str:
    lines = [_cells(row, name, label) for row in rows for name in row["competitors"]]
    titles = list(dict.fromkeys(title for line in lines for title in line))
    return measure.aligned([titles, *([line.get(title, "") for title in titles] for line in lines)], left=4)


def _cells(row: Row, name: str, label: str) -> dict[str, str]:
    """Title -> cell; what was not measured has none."""
    entry, size = row["competitors"][name], row["image_size"]
    low, high = entry["ratio_quartiles"]
    cells = {
        "model": row["model"],
        "image": str(size) if isinstance(size, int) else "x".join(map(str, size)),
        "mode": row["mode"],
        "competitor": name + (" *" if name == row[f"{label}_best"] else ""),
        "median ms": f"{1e3 * entry['median_s']:.2f}",
        "min": f"{1e3 * entry['min_s']:.2f}",
        "IQR": f"{1e3 * entry['iqr_s']:.2f}",
        f"x {label} best": f"{entry[f'ratio_to_{label}_best']:.3f}",
        "(quartiles)": f"({low:.3f}-{high:.3f})",
    }
    if "ratio_to_same_route" in entry:
        cells["x same route"] = f"{entry['ratio_to_same_route']:.3f}"
    if "images_per_s" in entry:
        cells["images/s"] = f"{entry['images_per_s']:.1f}"
    if "fraction_of_matmul_rate" in entry:
        cells["of rate"] = f"{entry['fraction_of_matmul_rate']:.1%}"
    if peak := entry.get("peak_bytes", entry.get("peak_training_bytes")):
        cells["peak MiB"] = f"{peak / 2**20:.1f}"
        cells[f"x {label}"] = f"{entry[f'memory_ratio_to_{label}_lowest']:.3f}"
    return cells
