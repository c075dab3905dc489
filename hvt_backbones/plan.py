"""Which way of sharing and recomputing lets a model train on given devices: `hvt plan`.

A strategy is a mode of the trainer's `parallel.mode` and what of the activations is recomputed. `ddp` and `fsdp2` are
tracked (`step_memory.py`). DeepSpeed's `zero1`, `zero2` and `zero3` cannot be run here: their activations are the
tracked ones, and the rest is what their authors divide (ZeRO, arXiv:1910.02054, Sec. 5) and DeepSpeed allocates.
`fsdp2-offload` is `fsdp2` without what `parallel.cpu_offload` keeps on the CPU.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from .errors import InputError, nearest
from .sharding import fsdp2_runs_on_cpu
from .step_memory import TRAINED_HERE, Memory, Step, track
from .variants import find_variant

MODES = ("ddp", "zero1", "zero2", "fsdp2", "zero3", "fsdp2-offload")  # the more is divided, the later
RECOMPUTED = (None, "attention", "mlp", "block", "stage")  # the more is computed twice, the later
MOST_DEVICES = 2**16
LONGEST_SIDE, LARGEST_BATCH = 8192, 65536  # that the trainer takes
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "communication")

# DeepSpeed's defaults, which the trainer leaves as they are: numbers of a buffer through which gradients go, and of
# parameters that are gathered at a time
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Strategy:
    """`str` is its name on the command line: `ddp`, `fsdp2+block`."""

    mode: str
    recompute: str | None = None

    def __str__(self) -> str:
        return self.mode if self.recompute is None else f"{self.mode}+{self.recompute}"

    @property
    def cost(self) -> tuple[bool, int, int]:
        """The cheaper, the smaller: computing twice costs more than exchanging more, and the CPU's optimiser most."""
        return self.mode == "fsdp2-offload", RECOMPUTED.index(self.recompute), MODES.index(self.mode)


STRATEGIES = sorted((Strategy(m, r) for m in MODES for r in RECOMPUTED), key=lambda strategy: strategy.cost)


@dataclass
class Plan:
    """The memory of strategies for one step; each tracked run is made once, when it is asked for.

    Attributes:
        step: of one device.
        devices: that train together.
    """

    step: Step
    devices: int
    _tracked: dict[tuple[str | None, bool], Memory] = field(default_factory=dict)

    def memory(self, strategy: Strategy) -> Memory:
        if not strategy.mode.startswith("zero"):
            memory = self._track(strategy.recompute, sharded=strategy.mode != "ddp")
            return replace(memory, parameters=0, gradients=0, optimizer=0) if "offload" in strategy.mode else memory
        return _zero(int(strategy.mode[-1]), self._track(strategy.recompute, sharded=False), self.devices)

    def _track(self, recompute: str | None, *, sharded: bool) -> Memory:
        key = recompute, sharded
        if key not in self._tracked:
            self._tracked[key] = track(self.step, recompute=recompute, devices=self.devices, sharded=sharded)
        return self._tracked[key]


def _zero(stage: int, whole: Memory, devices: int) -> Memory:
    """Memory of a stage of DeepSpeed's ZeRO in float32, from that of whole replicas.

    Beside its share of the optimiser's state it keeps one of the parameters that are updated. Gradients go through one
    buffer; from stage 2 on a device keeps its share of them, in stage 3 of the parameters, too.
    """
    parameters, optimizer = whole.parameters, -(-whole.optimizer // devices)
    share, buffer = -(-parameters // devices), 4 * REDUCE_BUCKET
    if stage < 3:
        gradients = share if stage == 2 else parameters + share
        return replace(
            whole, parameters=parameters + share, gradients=gradients, optimizer=optimizer, communication=buffer
        )
    gathered = min(parameters, 4 * LIVE_PARAMETERS)
    return replace(
        whole,
        parameters=2 * share,
        gradients=share,
        optimizer=optimizer,
        communication=buffer + gathered,
        traffic=whole.traffic * 3 // 2,
    )


def modes(task: str, device: str, devices: int) -> tuple[str, ...]:
    """Those that the trainers of this repository have for it, and that can be tracked."""
    if devices == 1 or task not in TRAINED_HERE:
        return MODES[:1]
    here = MODES if device == "cuda" else ("ddp", "fsdp2")
    return here if fsdp2_runs_on_cpu() else tuple(mode for mode in here if not mode.startswith("fsdp2"))


def choose_strategies(names: Sequence[str], task: str, device: str, devices: int) -> list[Strategy]:
    """Strategies by name, the cheapest first; by default every mode with nothing and with whole blocks recomputed.

    Raises:
        InputError: there is none of the name, or not for this.
    """
    possible = modes(task, device, devices)
    if not names:
        return [one for one in STRATEGIES if one.mode in possible and one.recompute in (None, "block")]
    known = {str(strategy): strategy for strategy in STRATEGIES}
    for name in names:
        if name not in known:
            raise InputError(
                f"unknown strategy {name!r}: {nearest(name, list(known), otherwise='')} give {', '.join(MODES[:-1])} "
                f"or {MODES[-1]}, alone or with what is recomputed (+mlp, +attention, +block, +stage)"
            )
        if known[name].mode not in possible:
            of = f"{task} on {devices} {device} device{'s' if devices > 1 else ''} (PyTorch {torch.__version__})"
            raise InputError(f"strategy {name!r} is not for {of}: choose {' or '.join(possible)}")
    return sorted({known[name] for name in names}, key=lambda strategy: strategy.cost)


def byte_count(text: str) -> int:
    """An amount of memory, such as 40GiB, 40GB or 512MiB, in bytes.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    count = 0
    if match:
        number, unit, binary = match.groups()
        count = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1))
    if not count:
        raise InputError(f"--memory {text}: is no amount of memory; give a number with its unit, such as 40GiB or 80GB")
    return count


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f}"


def describe_step(
    name: str,
    *,
    task: str | None = None,
    image_size: Sequence[int],
    frames: int | None = None,
    batch: int,
    precision: str | None = None,
    device: str = "cuda",
    max_logits: int | None = None,
    window_size: int | None = None,
) -> Step:
    """What the command line says of a step, checked and completed.

    Args:
        task: by default "video" for a video model, "classification" for others.
        image_size: a side, or height and width.
        frames: of a clip, by default those of the model's paper.
        precision: by default that of the trainer, "bf16", on the CPU "fp32".
        max_logits: see `Backbone.set_sequential_attention`.
        window_size: tokens along a side of a window, other than the model's.

    Raises:
        InputError: what does not go together.
    """
    variant = find_variant(name)[0]
    clips = variant.frames is not None
    task = task or ("video" if clips else "classification")
    if clips != (task == "video"):
        takes = "clips: give --task video" if clips else f"images: give --task {', '.join(TRAINED_HERE)} or detection"
        raise InputError(f"--task {task} is not for {variant.name}, which takes {takes}")
    if frames is not None and not clips:
        raise InputError(f"--frames {frames} is of clips, and {variant.name} takes images: leave it out")
    if len(image_size) > 2:
        raise InputError(f"--image-size takes HEIGHT WIDTH or one side, got {len(image_size)} numbers")
    for option, value, most in (("--image-size", max(image_size), LONGEST_SIDE), ("--batch", batch, LARGEST_BATCH)):
        if value > most:
            raise InputError(f"{option} {value}: give at most {most}, as the trainer takes")
    height, width = image_size if len(image_size) == 2 else (*image_size, *image_size)
    size = (frames or variant.frames, height, width) if variant.frames is not None else (height, width)
    precision = precision or ("fp32" if device == "cpu" else "bf16")
    return Step(
        name=variant.name,
        task=task,
        size=size,
        batch=batch,
        precision=precision,
        device=device,
        max_logits=max_logits,
        window_size=window_size,
    )


def rows(plan: Plan, strategies: Sequence[Strategy], limit: int) -> Iterator[str]:
    """Lines of the table, each when it is known."""
    step = plan.step
    each = f"on each of {plan.devices} devices" if plan.devices > 1 else "on one device"
    size = "x".join(map(str, step.size))
    yield f"{step.name}, {step.task}, {step.precision} on {step.device}, batch {step.batch} of {size} {each}"
    yield "GiB at the highest point of a step, and those that a device sends in it"
    names = ("strategy", "parameters", "gradients", "optimiser", *COLUMNS[3:], "total", "fits", "sent")
    yield _line(names)
    for strategy in strategies:
        memory = plan.memory(strategy)
        cells = [gibibytes(getattr(memory, column)) for column in COLUMNS]
        name = str(strategy) if strategy.mode in ("ddp", "fsdp2") else f"{strategy} *"
        fits = "yes" if memory.total <= limit else "no"
        yield _line((name, *cells, gibibytes(memory.total), fits, gibibytes(memory.traffic)))
    if any(strategy.mode not in ("ddp", "fsdp2") for strategy in strategies):
        yield "* not run: activations are tracked; the rest is by DeepSpeed's paper and default buffers, or on the CPU"
    if step.task == "detection":
        yield "the backbone alone: neck and heads need theirs beside it"


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<18}" + "".join(f"{cell:>14}" for cell in cells[1:]).rstrip()


def cheapest(plan: Plan, strategies: Sequence[Strategy], limit: int) -> Strategy:
    """The first, of strategies in the order of their cost, that fits.

    Raises:
        InputError: none does; the message says the nearest that would.
    """
    for strategy in strategies:
        if plan.memory(strategy).total <= limit:
            return strategy
    least = min(strategies, key=lambda strategy: plan.memory(strategy).total)
    needs = (
        f"{plan.step.name} fits {gibibytes(limit)} GiB in no way, {least} needs {gibibytes(plan.memory(least).total)}"
    )
    for words, strategy, near in _nearer(plan, least, limit):
        total = near.memory(strategy).total
        if total <= limit:
            raise InputError(f"{needs}: the nearest that fits is {words} with {strategy}, {gibibytes(total)} GiB")
    raise InputError(f"{needs}: nor with more devices, a smaller batch or smaller images; give more memory")


def _nearer(plan: Plan, strategy: Strategy, limit: int) -> Iterator[tuple[str, Strategy, Plan]]:
    """Other plans that may fit: with shards and more devices, then of smaller batches, then of smaller images."""
    step = plan.step
    if "fsdp2" in modes(step.task, step.device, 2):
        shards, near = Strategy("fsdp2", strategy.recompute or "block"), Plan(step, max(plan.devices, 2))
        yield f"{near.devices} devices", shards, near
        memory = near.memory(shards)
        left = memory.activations + memory.communication
        counts = [near.devices * 2**i for i in range(1, 11) if near.devices * 2**i <= MOST_DEVICES]
        fitting = [count for count in counts if left + (memory.total - left) * near.devices / count <= limit]
        yield from ((f"{count} devices", shards, Plan(step, count)) for count in fitting[:1])
    memory = plan.memory(strategy)

    def fits(share: float) -> bool:
        """Whether it would with such a share of the activations."""
        return memory.total - (1 - share) * memory.activations <= limit

    batches = [batch for batch in range(step.batch - 1, 0, -1) if fits(batch / step.batch)]
    yield from ((f"batch {b}", strategy, Plan(replace(step, batch=b), plan.devices)) for b in batches[:2])
    *frames, height, width = step.size
    shortest = min(height, width)
    shares = [side / shortest for side in range((shortest - 1) // 32 * 32, 0, -32)]
    for share in [share for share in shares if fits(share**2 / step.batch)][:2]:
        size = (*frames, round(height * share), round(width * share))
        words = f"batch 1 of {'x'.join(map(str, size))}"
        yield words, strategy, Plan(replace(step, size=size, batch=1), plan.devices)


def recipe(step: Step, strategy: Strategy, devices: int) -> str:
    """The settings that a strategy needs: of the trainer in YAML, or of a configuration for MMEngine."""
    recompute = strategy.recompute or False
    if step.task not in TRAINED_HERE:
        amp = ", with --amp bf16" if step.precision == "bf16" else ""
        window = "" if step.window_size is None else f", window_size={step.window_size}"
        lines = [
            f"# of a configuration for MMEngine{amp}",
            f"model = dict(backbone=dict(with_cp={recompute!r}, max_logits={step.max_logits}{window}))",
            f"train_dataloader = dict(batch_size={step.batch})",
        ]
        return "\n".join(lines)
    height, width = step.size
    mode = strategy.mode.replace("-offload", ", cpu_offload: true")
    window = "" if step.window_size is None else f", overrides: {{window_size: {step.window_size}}}"
    logits = "null" if step.max_logits is None else step.max_logits
    machines = f"--nproc_per_node {devices}"
    if devices > 8 and devices % 8 == 0:
        machines = f"--nnodes {devices // 8} --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500"
    lines = [
        f"# torchrun {machines} -m classification.train THIS_FILE --data-dir DIR",
        f"model: {{name: {step.name}, grad_checkpointing: {str(recompute).lower()}, max_logits: {logits}{window}}}",
        f"data: {{input_size: [3, {height}, {width}], batch_size: {step.batch}}}",
        f"train: {{amp: {step.precision}, task: {step.task}}}",
        f"parallel: {{mode: {mode}}}" + ("  # needs DeepSpeed" if mode.startswith("zero") else ""),
    ]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """`hvt plan`."""
    memory = byte_count(args.memory)
    if args.devices > MOST_DEVICES:
        raise InputError(f"--devices {args.devices}: give at most {MOST_DEVICES}")
    step = describe_step(
        args.model,
        task=args.task,
        image_size=args.image_size,
        frames=args.frames,
        batch=args.batch,
        precision=args.precision,
        device=args.device,
        max_logits=args.max_logits,
        window_size=args.window_size,
    )
    strategies = choose_strategies(args.strategy, step.task, step.device, args.devices)
    plan = Plan(step, args.devices)
    _ = plan.memory(strategies[0])  # refuses a size that is none for the model, before the table begins
    for line in rows(plan, strategies, memory):
        print(line, flush=True)
    best = cheapest(plan, strategies, memory)
    print(f"\nthe cheapest that fits: {best}, {gibibytes(plan.memory(best).total)} of {gibibytes(memory)} GiB\n")
    print(recipe(step, best, args.devices))
