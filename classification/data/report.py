"""`python -m classification.data [RECIPE] [--check | --benchmark] [--key value ...]`: look at the data before training.

Without a switch it describes the pictures. `--check` reads every one of them. `--benchmark` measures how many pictures
per second the training loader decodes and augments, and says whether they or the device limit the training.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from hvt_backbones import InputError
from hvt_backbones.device import select_device
from hvt_backbones.errors import exit_on_input_error

from ..command_line import parse_command_line
from ..config import Config
from .loading import endless, eval_loader, open_data, train_loader
from .pictures import Pictures

ENOUGH = 1.1  # times the device's rate: what leaves some air for a slow disk
USAGE = """usage: python -m classification.data [RECIPE] [--check | --benchmark] [--key value ...]

  (no switch)   pictures and classes of the recipe's data; RECIPE is digits if none is given
  --check       read every picture and list those that cannot be read; exits with 1 if there are any
  --benchmark   pictures per second of the loader, of the device, and which of the two is the bottleneck;
                and how many cores the device needs

The settings are the trainer's: python -m classification.train --help"""


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(USAGE)
        return 0
    switches = {word for word in words if word in ("--check", "--benchmark")}
    if len(switches) > 1:
        raise InputError("--check contradicts --benchmark; give one of the two.")
    rest = [word for word in words if word not in switches]
    if not rest or rest[0].startswith("-"):
        rest.insert(0, "digits")
    config = parse_command_line(rest)
    if switches == {"--benchmark"}:
        benchmark(config)
        return 0
    return describe(config, check=bool(switches))


def describe(config: Config, *, check: bool) -> int:
    """Print what the data is made of; with `check` also which pictures cannot be read. Returns the exit status."""
    if check:  # all of them are to be found, not the first
        config = replace(config, data=replace(config.data, on_error="skip", max_errors=1.0))
    damaged = 0
    splits = (config.data.train_split, config.data.val_split)
    for split, pictures in zip(splits, open_data(config.data, config.augmentation, config.train.seed), strict=True):
        counts = pictures.class_counts()
        names = pictures.class_names
        print(
            f"{split}: {len(pictures)} pictures of {len(names)} classes ({names[0]} ... {names[-1]}), "
            f"{counts.min()} ({names[counts.argmin()]}) to {counts.max()} ({names[counts.argmax()]}) to a class"
        )
        if check:
            unreadable = find_unreadable(pictures, config)
            damaged += len(unreadable)
            for name in unreadable:
                print(f"  cannot be read: {name}")
            print(f"  {len(pictures) - len(unreadable)} of {len(pictures)} can be read")
    return 1 if damaged else 0


def find_unreadable(pictures: Pictures, config: Config) -> list[str]:
    """The names of the pictures that do not decode."""
    pictures.transform, pictures.crop = _nothing, None
    loader = eval_loader(pictures, config.data.batch_size, config.data.workers, rank=0, world=1, pin=False)
    progress = tqdm(loader, desc="check", unit="batch", leave=False, dynamic_ncols=True, disable=None)
    return [name for batch in progress for name in batch.unreadable]


def _nothing(picture: Any) -> torch.Tensor:
    return torch.empty(0, 0, 0)


def worker_counts(own: int, cores: int) -> list[int]:
    """The recipe's own number of workers, and 1, 2, 4, ... up to one per core."""
    powers = {2**power for power in range(cores.bit_length())}
    return sorted({own, *powers, cores})


def loader_rate(config: Config, pictures: Pictures, workers: int, seconds: float = 5.0) -> float:
    """Pictures per second that the training loader delivers when nobody makes it wait."""
    loader = train_loader(
        pictures, replace(config.data, workers=workers), seed=config.train.seed, rank=0, world=1, pin=False
    )
    if len(loader) == 0:
        raise InputError(
            f"data.batch_size: {len(pictures)} training pictures do not fill one batch of {config.data.batch_size}; "
            "lower it."
        )
    stream = endless(loader, None)
    for _ in range(2 * workers + 1):  # the workers start, and their first batches arrive together
        next(stream)
    images, start = 0, time.perf_counter()
    while images < 2 * config.data.batch_size * max(workers, 1) or time.perf_counter() - start < seconds:
        images += len(next(stream).images)
    return images / (time.perf_counter() - start)


def benchmark(config: Config) -> None:
    """Print the rates of the loader and of the device, and one sentence about them."""
    from ..benchmark import device_rate

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pictures, _ = open_data(config.data, config.augmentation, config.train.seed)
    print(f"{len(pictures)} pictures, {config.data.input_size[1]}x{config.data.input_size[2]}, {cores} cores")
    rates = {}
    print("workers  images/s")
    for workers in worker_counts(config.data.workers, cores):
        rates[workers] = loader_rate(config, pictures, workers)
        mark = "  (data.workers)" if workers == config.data.workers else ""
        print(f"{workers:7}  {rates[workers]:8.0f}{mark}", flush=True)
    device = device_rate(config)
    kind = select_device(config.train.device).type
    print(f"{kind:>7}  {device:8.0f}  (training steps of one process, without the data)")
    print(verdict(rates, config.data.workers, device, cores))
    print(
        f"One worker delivers {rates[1]:.0f} images/s: {cores_needed(rates[1], device)} cores keep up with this device."
    )


def cores_needed(rate: float, device: float) -> int:
    """How many cores feed a device of that rate, from the rate of a worker that has a core to itself."""
    return math.ceil(ENOUGH * device / rate)


def verdict(rates: dict[int, float], own: int, device: float, cores: int) -> str:
    """One sentence: what limits the training, and what to change.

    Args:
        rates: number of workers -> pictures per second of the loader.
        own: the recipe's number of workers.
        device: pictures per second of the training step.
        cores: of this machine.
    """
    if rates[own] >= ENOUGH * device:
        return (
            f"The device is the bottleneck: with data.workers = {own} the loader delivers {rates[own] / device:.1f} "
            "times what it trains; more workers would change nothing, train.amp or train.compile may."
        )
    enough = [workers for workers in sorted(rates) if rates[workers] >= ENOUGH * device]
    if enough:
        advice = f"set data.workers = {enough[0]}"
    else:
        best = max(rates, key=rates.__getitem__)
        more = f"set data.workers = {best} and " if rates[best] > ENOUGH * rates[own] else ""
        advice = (
            f"{more}use more than these {cores} cores, store the pictures as smaller JPEGs (shorter side little above "
            "the input's), or augment less"
        )
    return (
        f"The data is the bottleneck: with data.workers = {own} the loader delivers {rates[own]:.0f} of the "
        f"{device:.0f} images/s that the device trains; {advice}."
    )
