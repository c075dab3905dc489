"""What `hvt plan` says of a training step's memory beside what the step takes.

    python -m benchmarks.plan --out benchmarks/results/plan_cpu.json
    python -m benchmarks.plan --recorded benchmarks/results/peers_h200_bfloat16.json

Measured is the sum of the profiler's records of every allocation and release in a real step (`measure.peak_memory`),
which knows nothing of trackers or fake tensors: on one process, and on two that gloo joins, with PyTorch's DDP and the
trainer's FSDP2. With `--recorded` it is what `peers` or `dense` measured on a GPU once.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.plan import describe_step
from hvt_backbones.sharding import shard_blocks
from hvt_backbones.step_memory import Step, track

from . import measure
from .comparison import output_file

MODELS = {"swin_tiny": (224, 320), "swinv2_tiny_window8": (256, 384), "pvt_v2_b1": (224, 320), "twins_svt_small": (224, 320)}
# processes, sharded, recomputed
WAYS = (
    (1, False, None),
    (1, False, "block"),
    (1, False, "attention"),
    (2, False, None),
    (2, True, None),
    (2, True, "block"),
)
CPU = torch.device("cpu")
MIB = 2**20


def measured(step: Step, recompute: str | None, processes: int, *, sharded: bool) -> int:
    """Bytes at the highest point of the second step, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = step, recompute, processes, sharded, folder
        multiprocessing.spawn(_measure, arguments, nprocs=processes)
        return int(Path(folder, "peak").read_text())


def _measure(rank: int, step: Step, recompute: str | None, processes: int, sharded: bool, folder: str) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)

    def build() -> measure.Work:
        model: Any = step.model()
        model.set_grad_checkpointing(recompute or False)
        if sharded:
            shard_blocks(model, init_device_mesh("cpu", (processes,)))
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes > 1 and not sharded else model
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        images = torch.randn(step.batch, 3, *step.size)

        def work() -> None:
            step.run(wrapped, images)
            optimizer.step()
            optimizer.zero_grad()

        return work

    peak = measure.peak_memory(build, CPU)
    if rank == 0:
        Path(folder, "peak").write_text(str(peak))
    if processes > 1:
        dist.destroy_process_group()


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


def compare(models: Sequence[str], ways: Sequence[int], batch: int) -> Iterator[dict[str, Any]]:
    """On the CPU, in float32."""
    for name in models:
        for side in MODELS[name]:
            step = describe_step(name, image_size=(side,), batch=batch, device="cpu")
            for processes, sharded, recompute in (WAYS[way] for way in ways):
                memory = track(step, recompute=recompute, devices=processes, sharded=sharded)
                mode = "fsdp2" if sharded else "ddp" if processes > 1 else "one device"
                real = measured(step, recompute, processes, sharded=sharded)
                yield row(step, mode + (f"+{recompute}" if recompute else ""), real, memory.total)


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
        yield row(step, "one device", real, total)


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.plan", description="Compare tracked with measured memory.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ways", nargs="+", type=int, choices=range(len(WAYS)), default=list(range(len(WAYS))))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--recorded", type=Path, nargs="+", help="results of peers or dense on a GPU")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write all numbers there as JSON")
    options = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = []
    sources = (
        [compare_recorded(file) for file in options.recorded]
        if options.recorded
        else [compare(options.models, options.ways, options.batch)]
    )
    print(f"{'model':<22}{'size':<14}{'batch':>6} {'precision':<10}{'way':<22}{'measured':>10}{'tracked':>10}{'ratio':>8}  MiB")
    for source in sources:
        for one in source:
            found.append(one)
            size = "x".join(map(str, one["size"]))
            print(
                f"{one['model']:<22}{size:<14}{one['batch']:>6} {one['precision']:<10}{one['way']:<22}"
                f"{one['measured_bytes'] / MIB:>10.1f}{one['tracked_bytes'] / MIB:>10.1f}{one['ratio']:>8.3f}",
                flush=True,
            )
    print(f"{len(found)} points, ratios from {min(r['ratio'] for r in found):.3f} to {max(r['ratio'] for r in found):.3f}")
    if options.out:
        with whole_file(options.out) as path:
            path.write_text(json.dumps({"machine": measure.machine(CPU), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
