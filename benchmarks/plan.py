"""What `hvt plan` says of a training step's memory beside what the step takes.

    python -m benchmarks.plan --out benchmarks/results/plan_cpu.json
    python -m benchmarks.plan --recorded benchmarks/results/peers_h200_bfloat16.json

Measured is the sum of the profiler's records of every allocation and release in a real step (`measure.peak_memory`),
which knows nothing of trackers or fake tensors. Of two processes that gloo joins, with PyTorch's DDP and the trainer's
FSDP2, it is the resident size (`_peak_resident`). With `--recorded` it is what others measured on a GPU once.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hvt_backbones.errors import ArgumentParser, exit_on_input_error, whole_number
from hvt_backbones.plan import describe_step
from hvt_backbones.sharding import shard_blocks
from hvt_backbones.step_memory import Step, track

from . import measure
from .comparison import output_file

MODELS = {
    "swin_tiny": (160, 224),
    "swinv2_tiny_window8": (192, 256),
    "pvt_v2_b1": (160, 224),
    "twins_svt_small": (160, 224),
}
# name -> processes, whether they shard, what is recomputed
WAYS: dict[str, tuple[int, bool, str | None]] = {
    "one": (1, False, None),
    "one+block": (1, False, "block"),
    "one+attention": (1, False, "attention"),
    "ddp": (2, False, None),
    "fsdp2": (2, True, None),
    "fsdp2+block": (2, True, "block"),
}
# glibc: what is released is given back to the system, at once
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
CPU = torch.device("cpu")
MIB = 2**20


def measured(step: Step, recompute: str | None, processes: int, *, sharded: bool) -> int:
    """Bytes at the highest point of the second step, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = step, recompute, processes, sharded, folder
        os.environ.update(MALLOC)
        multiprocessing.spawn(_measure, arguments, nprocs=processes)
        return int(Path(folder, "peak").read_text())


def _measure(rank: int, step: Step, recompute: str | None, processes: int, sharded: bool, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)

    def build(*, small: bool = False) -> measure.Work:
        model: Any = step.model()
        model.set_grad_checkpointing(recompute or False)
        if sharded:
            shard_blocks(model, init_device_mesh("cpu", (processes,)))
        wrapped = (
            DistributedDataParallel(model, gradient_as_bucket_view=True) if processes > 1 and not sharded else model
        )
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        images = torch.randn(1, 3, *[64 for _ in step.size]) if small else torch.randn(step.batch, 3, *step.size)

        def work() -> None:
            step.run(wrapped, images)
            optimizer.step()
            optimizer.zero_grad()

        return work

    peak = measure.peak_memory(build, CPU) if processes == 1 else _peak_resident(build)
    if rank == 0:
        Path(folder, "peak").write_text(str(peak))
    if processes > 1:
        dist.destroy_process_group()


def _peak_resident(build: Callable[..., measure.Work]) -> int:
    """As `measure.peak_memory`, of the resident size: gloo's threads release tensors, which the profiler does not see.

    The allocator keeps nothing of what is released (`MALLOC`), but pages that are never written do not count.
    """

    def resident(key: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])

    build(small=True)()  # what code and libraries need for themselves
    gc.collect()
    before = resident("VmRSS")
    work = build()
    work()
    Path("/proc/self/clear_refs").write_text("5")  # the highest size so far is that of now
    work()
    return resident("VmHWM") - before


def row(step: Step, way: str, real: int, tracked: int) -> dict[str, Any]:
    return {
        "model": step.name,
        "task": step.task,
        "size": list(step.size),
        "batch": step.batch,
        "precision": step.precision,
        "device": step.device,
        "way": way,
        "measured_bytes": real,
        "tracked_bytes": tracked,
        "ratio": tracked / real,
    }


def compare(models: Sequence[str], ways: Sequence[str], batch: int) -> Iterator[dict[str, Any]]:
    """On the CPU, in float32."""
    for name in models:
        for side in MODELS[name]:
            step = describe_step(name, image_size=(side,), batch=batch, device="cpu")
            for way in ways:
                processes, sharded, recompute = WAYS[way]
                memory = track(step, recompute=recompute, devices=processes, sharded=sharded)
                real = measured(step, recompute, processes, sharded=sharded)
                yield row(step, way, real, memory.total)


def compare_recorded(file: Path) -> Iterator[dict[str, Any]]:
    """On a GPU: training steps of `peers`, and forward and backward of `dense`, which makes no update."""
    content = json.loads(file.read_text())
    precision = {"float32": "fp32", "bfloat16": "bf16"}[content["arguments"]["dtype"]]
    for one in content["rows"]:
        if one["mode"] not in ("train", "backward") or one["model"].endswith("_bare"):
            continue
        dense = one["mode"] == "backward"
        name = {"swinv2_tiny": "swinv2_tiny_window8"}.get(one["model"], one["model"])
        *frames, height, width = one["image_size"] if dense else [one["image_size"]] * 2
        task = None if name.startswith("video") else "detection" if dense else "classification"
        step = describe_step(
            name,
            task=task,
            image_size=(height, width),
            frames=frames[0] if frames else None,
            batch=one["batch"],
            precision=precision,
        )
        memory = track(step)
        total = memory.total - (memory.optimizer if dense else 0)
        real = one["competitors"]["hvt"]["peak_bytes" if dense else "peak_training_bytes"]
        yield row(step, "one", real, total)


def _line(model: str, size: str, batch: str, precision: str, way: str, *figures: str) -> str:
    return f"{model:<21}{size:<12}{batch:>5}  {precision:<11}{way:<14}" + "".join(f"{cell:>10}" for cell in figures)


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.plan", description="Compare tracked with measured memory.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batch", type=whole_number(1), default=8)
    parser.add_argument("--recorded", type=Path, nargs="+", help="results of peers or dense on a GPU")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write all numbers there as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in the processes that measure: each thread has its own part of the workspace
    if options.recorded:
        points = itertools.chain.from_iterable(map(compare_recorded, options.recorded))
    else:
        points = compare(options.models, options.ways, options.batch)
    report: dict[str, Any] = {"command": " ".join(["python -m benchmarks.plan", *(argv or sys.argv[1:])])}
    report |= {"revision": measure.revision(), "machine": measure.machine(CPU), "rows": []}
    print(
        f"{'model':<21}{'size':<12}{'batch':>6} {'precision':<10}{'way':<14}{'measured':>10}{'tracked':>10}{'ratio':>8}"
    )
    for one in points:
        report["rows"].append(one)
        figures = f"{one['measured_bytes'] / MIB:.1f}", f"{one['tracked_bytes'] / MIB:.1f}", f"{one['ratio']:.3f}"
        size = "x".join(map(str, one["size"]))
        print(_line(one["model"], size, str(one["batch"]), one["precision"], one["way"], *figures), flush=True)
    ratios = [one["ratio"] for one in report["rows"]]
    print(f"MiB; {len(ratios)} points, tracked over measured from {min(ratios):.3f} to {max(ratios):.3f}")
    if options.out:
        measure.write_json(options.out, report)


if __name__ == "__main__":
    raise SystemExit(main())
