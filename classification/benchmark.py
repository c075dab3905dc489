"""`--benchmark-steps N`: how fast training steps are, on data that costs nothing and on the real pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, repeat

import torch

from hvt_backbones.model_file import entry

from .config import Config
from .data.loading import Batch, endless
from .distributed import precision
from .reporting.log import peak_memory
from .trainer import Trainer

WARMUP_STEPS = 10
STEPS = 10  # where nobody says how many


def measure(trainer: Trainer) -> dict[str, dict[str, float]]:
    """Time `train.benchmark_steps` optimiser steps after a warm-up, print them, and leave nothing behind.

    "synthetic" repeats one batch that is on the device already; "real" reads, decodes and augments, so that the
    difference is what the data costs. A step is a whole one: forward and backward of every accumulated batch,
    clipping, optimiser, average.

    Returns:
        Per kind of data: ms_per_step (mean), images_per_second (of all devices), images_per_second_per_device,
        peak_memory_gib.
    """
    accelerator, config = trainer.accelerator, trainer.config
    steps, devices = config.train.benchmark_steps, accelerator.num_processes
    assert steps is not None  # else nobody asks for a measurement
    results = {"synthetic": _measure(trainer, steps, synthetic_batches(trainer))}
    if config.data.kind != "synthetic":
        results["real"] = _measure(trainer, steps, endless(trainer.train_loader, accelerator.device))
    accelerator.print(
        f"{entry(trainer.description, 'model')}, {devices} x {accelerator.device.type}, precision "
        f"{precision(accelerator)}, global batch {trainer.progress.global_batch}, "
        f"{steps} steps after {WARMUP_STEPS} of warm-up"
    )
    for kind, figures in results.items():
        accelerator.print(
            f"{kind:9}  {figures['ms_per_step']:.2f} ms/step  {figures['images_per_second']:.1f} images/s (FPS)  "
            f"{figures['images_per_second_per_device']:.1f} per device  {figures['peak_memory_gib']:.2f} GiB"
        )
    if "real" in results:
        share = 1 - results["synthetic"]["ms_per_step"] / results["real"]["ms_per_step"]
        accelerator.print(f"the data costs {max(share, 0):.0%} of a step")
    return results


def synthetic_batches(trainer: Trainer) -> Iterator[Batch]:
    """One batch of noise, again and again, on the device."""
    device, size = trainer.accelerator.device, trainer.config.data.batch_size
    images = torch.randn(size, *trainer.config.data.input_size, device=device)
    targets = torch.randint(len(trainer.train_data.class_names), (size,), device=device)
    return repeat(Batch(images, targets, torch.zeros(size, dtype=torch.long), torch.arange(size), []))


def _measure(trainer: Trainer, steps: int, stream: Iterator[Batch]) -> dict[str, float]:
    accelerator, config, learner = trainer.accelerator, trainer.config, trainer.learner
    device = accelerator.device
    learner.wrapped.train()
    if device.type != "cpu":
        torch.get_device_module(device).reset_peak_memory_stats(device)
    seconds = []
    for number in range(1, WARMUP_STEPS + steps + 1):
        begin = time.perf_counter()
        learner.step(list(islice(stream, config.train.accumulation)), number)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begin)
    # the mean: workers deliver in bursts, so that the median step of a run that waits for data has not waited
    mean = sum(seconds[WARMUP_STEPS:]) / steps
    rate = trainer.progress.global_batch / mean
    return {
        "ms_per_step": 1000 * mean,
        "images_per_second": rate,
        "images_per_second_per_device": rate / accelerator.num_processes,
        "peak_memory_gib": peak_memory(device),
    }


def device_rate(config: Config) -> float:
    """Images per second that the training step of `config` takes on this machine, data aside."""
    data = replace(config.data, kind="synthetic", workers=0)
    trainer = Trainer(replace(config, data=data, train=replace(config.train, benchmark_steps=STEPS)))
    return _measure(trainer, STEPS, synthetic_batches(trainer))["images_per_second"]
