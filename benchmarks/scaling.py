"""`python -m benchmarks.scaling`: what a step of the large SwinV2 takes on 8, 64 and 512 devices, computed.

Memory and bytes are those of `hvt plan`, operations PyTorch's count of a forward pass. Times follow from the rates that
are stated, of which none is measured here: a step takes at least the longer of computing and exchanging (where they
overlap wholly), at most both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from hvt_backbones.errors import exit_on_input_error, whole_number
from hvt_backbones.plan import Plan, byte_count, cheapest, choose_strategies, describe_step, gibibytes
from hvt_backbones.step_memory import Step

STRATEGIES = ("ddp", "fsdp2", "fsdp2+block")
MEMORY = "76GB"  # of 80: CUDA's context and the allocator's fragments need theirs
OPERATIONS = 100e12  # of bf16 a second on a device: a third of what an A100 can do at most
WITHIN, BETWEEN = 250e9, 25e9  # bytes a second, each way, of a device: in a machine of 8, and between machines
IMAGENET_22K = 14_197_122
STEPS = (
    describe_step("swinv2_large_window12_192", image_size=(192,), batch=64),
    describe_step("swinv2_large_window12to24_384", image_size=(384,), batch=16),
    describe_step("swinv2_huge", image_size=(512,), batch=16),
    describe_step("swinv2_giant", image_size=(1536,), batch=1),
    describe_step("swinv2_large_window12_192", task="simmim", image_size=(192,), batch=64),
    describe_step("swinv2_huge", task="simmim", image_size=(192,), batch=32, window_size=12),
    describe_step("swinv2_giant", task="simmim", image_size=(192,), batch=16, window_size=12),
)


def operations(step: Step) -> int:
    """Of a forward pass of one image; a multiplication with its addition counts as two."""
    one = replace(step, batch=1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        one.run(one.model(), torch.empty(1, 3, *step.size))
    return counter.get_total_flops() // 3  # a backward pass takes twice as many


def rows(steps: Sequence[Step], counts: Sequence[int]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| | batch | devices | strategy | GiB | sent, GiB | computing, s | exchanging, s | epoch of 22K, h |"
    yield "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    for step in steps:
        each = operations(step)
        name = step.name.split("_window")[0] + (", SimMIM" if step.task == "simmim" else "")
        for devices in counts:
            plan = Plan(step, devices)
            best = cheapest(plan, choose_strategies(STRATEGIES, step.task, step.device, devices), byte_count(MEMORY))
            memory = plan.memory(best)
            computing = step.batch * each * (4 if best.recompute else 3) / OPERATIONS
            exchanging = memory.traffic / (WITHIN if devices <= 8 else BETWEEN)
            images = IMAGENET_22K / step.batch / devices / 3600
            least, most = (images * seconds for seconds in (max(computing, exchanging), computing + exchanging))
            yield (
                f"| {name}, {step.size[0]} | {step.batch} | {devices} | `{best}` | {gibibytes(memory.total)} "
                f"| {gibibytes(memory.traffic)} | {computing:.3f} | {exchanging:.3f} | {least:.3g} to {most:.3g} |"
            )


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--devices", type=whole_number(2), nargs="+", default=[8, 64, 512], metavar="N")
    args = parser.parse_args(argv)
    for line in rows(STEPS, args.devices):
        print(line, flush=True)


if __name__ == "__main__":
    main()
