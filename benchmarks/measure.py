"""What every benchmark shares: paired timing, peak memory, the machine's matrix-product rate and its description."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

from hvt_backbones.atomic import whole_file
from hvt_backbones.doctor import installed_version

ROOT = Path(__file__).resolve().parents[1]
Work = Callable[[], object]
MEASURED = "the measured step"


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given; the CPU works as it goes."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Clock:
    """Times work on a device, from an idle device to an idle device.

    Attributes:
        kind: "wall", or "process" for the processor time of all threads, which leaves out the time that other
            processes took, but counts threads that wait for each other.
    """

    device: torch.device
    kind: str = "wall"

    def seconds(self, work: Work, calls: int = 1) -> float:
        """Seconds per call."""
        now = time.perf_counter if self.kind == "wall" else time.process_time
        synchronise(self.device)
        start = now()
        for _ in range(calls):
            work()
        synchronise(self.device)
        return (now() - start) / calls


def interleave(
    competitors: Mapping[str, Work], clock: Clock, *, rounds: int, warmup: int = 2, shortest: float = 0.05
) -> dict[str, list[float]]:
    """Time all competitors in turn, round after round: sample i of each was taken within the same moments.

    On a machine that others use too, only samples of one round may be compared. Every round starts with another
    competitor and every second one goes backwards, so that nobody always follows the same neighbour.

    Args:
        competitors: name -> the work of one call.
        rounds: samples of each.
        warmup: rounds before, which are not kept.
        shortest: seconds that a sample must last at least; shorter work is called several times, by all equally often.

    Returns:
        name -> seconds per call, one for each round.
    """
    names = list(competitors)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # so that no collection falls into one competitor's time
    try:
        for _ in range(max(1, warmup)):
            fastest = min(clock.seconds(work) for work in competitors.values())
        calls = max(1, min(200, round(shortest / max(fastest, 1e-6) + 0.5)))
        samples: dict[str, list[float]] = {name: [] for name in names}
        for index in range(rounds):
            start = index // 2 % len(names)
            order = names[start:] + names[:start]
            for name in order if index % 2 == 0 else reversed(order):
                samples[name].append(clock.seconds(competitors[name], calls))
    finally:
        if collecting:
            gc.enable()
    return samples


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
    return low, median, high


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of ours over theirs within each round: what the load of the machine does to both cancels."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def compare(
    samples: Mapping[str, Sequence[float]], memory: Mapping[str, int], rivals: Sequence[str], label: str
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Times, and peak memory where it was measured, of each competitor, and their ratios to the best of `rivals`.

    Args:
        samples: name -> seconds, as `interleave` gives them.
        memory: name -> bytes, or nothing.
        label: what the rivals are called in the keys: `ratio_to_LABEL_best`, `memory_ratio_to_LABEL_lowest`.

    Returns:
        The fastest rival, and name -> figures.
    """
    best = min(rivals, key=lambda name: statistics.median(samples[name]))
    figures: dict[str, dict[str, Any]] = {}
    for name, times in samples.items():
        low, median, high = quartiles(times)
        low_ratio, ratio, high_ratio = paired_ratio(times, samples[best])
        figures[name] = {
            "median_s": median,
            "min_s": min(times),
            "iqr_s": high - low,
            f"ratio_to_{label}_best": ratio,
            "ratio_quartiles": [low_ratio, high_ratio],
            "samples_s": list(times),
        }
        if memory:
            lowest = min(memory[one] for one in rivals)
            figures[name] |= {"peak_bytes": memory[name], f"memory_ratio_to_{label}_lowest": memory[name] / lowest}
    return best, figures


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Lines of cells as text, the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def peak_memory(build: Callable[[], Work], device: torch.device) -> int:
    """Bytes of tensors alive at the highest point of the second call of what `build` makes.

    Everything made since the start of `build` counts: weights, gradients, optimiser state, activations and the
    workspace that operators allocate as tensors. The first call is left out because it creates optimiser state and
    caches. On the CPU these are the profiler's records of every allocation and release, exact and the same on each
    run; the resident size of the process would add whatever the allocator keeps for later.
    """
    gc.collect()
    if device.type != "cpu":
        backend = torch.get_device_module(device)
        before = backend.memory_allocated(device)
        work = build()
        work()
        synchronise(device)
        backend.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return backend.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler reports every device that it does not find
    with profile(profile_memory=True) as profiler:
        work = build()
        work()
        with record_function(MEASURED):
            work()
    return _peak_of_records(profiler)


def _peak_of_records(profiler: profile) -> int:
    records, begin, end = [], None, None
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            records.append((event.start_ns(), event.nbytes()))
        elif event.name() == MEASURED:
            begin, end = event.start_ns(), event.end_ns()
    alive = peak = 0
    for moment, change in sorted(records, key=lambda record: record[0]):  # stable: equal moments keep their order
        alive += change
        if begin <= moment <= end:
            peak = max(peak, alive)
    return peak


def matmul_rate(device: torch.device, dtype: torch.dtype, *, kind: str = "wall", budget: float = 1.0) -> dict[str, Any]:
    """The best rate of a large square matrix product here, on random values: {"flops_per_s", "side"}.

    The best, not the median, because it stands for what the machine can do.

    Args:
        kind: of the clock, as what is compared with the rate was timed.
        budget: seconds to spend, about.
    """
    sides = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    clock = Clock(device, kind)
    best = {"flops_per_s": 0.0, "side": 0}
    for side in sides:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        stop = time.perf_counter() + budget / len(sides)
        while True:
            rate = 2 * side**3 / clock.seconds(partial(torch.mm, a, b), 1 if device.type == "cpu" else 10)
            if rate > best["flops_per_s"]:
                best = {"flops_per_s": rate, "side": side}
            if time.perf_counter() > stop:
                break
    return best


def add_rate(report: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Measure the rate of a large matrix product once more, and fill in the fraction of it that competitors reach.

    After each row again, and the best is kept: the machine may have been busy before. Rows have "flops", the
    operations of a call.
    """
    again = matmul_rate(device, dtype, kind=report["arguments"]["clock"])
    report["matmul_rate"] = max(report.get("matmul_rate", again), again, key=lambda rate: rate["flops_per_s"])
    for row in report["rows"]:
        for entry in row["competitors"].values():
            entry["flops_per_s"] = row["flops"] / entry["median_s"]
            entry["fraction_of_matmul_rate"] = entry["flops_per_s"] / report["matmul_rate"]["flops_per_s"]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write all or nothing.

    Raises:
        InputError: it cannot be written.
    """
    with whole_file(path) as partial_file:
        partial_file.write_text(json.dumps(report, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were taken on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "device": str(device),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{name: installed_version(name) for name in ("torch", "timm", "torchvision", "numpy")},
        "mmdet": installed_version("onedl-mmdetection", "mmdet"),
        "mmseg": installed_version("onedl-mmsegmentation", "mmsegmentation"),
        "mmaction2": installed_version("mmaction2"),
    }
    if hasattr(os, "getloadavg"):
        facts["load_average"] = os.getloadavg()[0]
    if device.type != "cpu":
        facts["device_name"] = torch.get_device_module(device).get_device_name(device)
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "tf32_convolutions": torch.backends.cudnn.allow_tf32}
    return facts


def heading(report: Mapping[str, Any]) -> str:
    """What a table was measured on: from a report's "machine", "arguments", "revision" and, if there, "matmul_rate"."""
    machine, arguments = report["machine"], report["arguments"]
    tf32 = f", tf32 {'on' if arguments['tf32'] else 'off'}" if machine["device"].startswith("cuda") else ""
    rate = report.get("matmul_rate")
    products = f"matrix products {rate['flops_per_s'] / 1e9:.0f} GFLOP/s, " if rate else ""
    return (
        f"{machine.get('device_name') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"timm {machine['timm']}, {arguments['dtype']}{tf32}, batch {arguments['batch']}, {products}"
        f"{arguments['clock']} clock, revision {report['revision']}"
    )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def revision() -> str | None:
    """The commit of this checkout, with "+changes" where files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
