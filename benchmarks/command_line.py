"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from hvt_backbones.device import select_device
from hvt_backbones.errors import InputError, nearest, whole_number
from hvt_backbones.ops import IMPLEMENTATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def output_file(text: str) -> Path:
    path = Path(text)
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: give a file in a folder that exists")
    return path


def add_measuring(parser: argparse.ArgumentParser, *, batch: int, rounds: int) -> None:
    """The arguments of every command that times competitors against each other; `prepare` reads them."""
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


def known_models(names: Iterable[str], models: Collection[str]) -> None:
    """Raises:
    InputError: a name that is none of `models`.
    """
    for name in names:
        if name not in models:
            raise InputError(f"no peers are known for {name!r}: {nearest(name, list(models))}")


def prepare(options: argparse.Namespace) -> torch.device:
    """The device that was asked for, with threads and tf32 set.

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
    return device
