"""Devices, precision and processes: accelerate's, and PyTorch's own for FSDP2.

accelerate shards with FSDP2 on accelerators alone, so `fully_shard` is called here: one path, the same with gloo on
the CPU as with nccl or hccl.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed.nn  # now: imported while there is a group, its functions would keep that for ever
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from hvt_backbones import Classifier, InputError
from hvt_backbones.device import select_device

PARTING = 5.0  # seconds between the last that is heard of a process and its end
HEAD_START = 0.5  # seconds for torchrun to see that end: the first that it sees is the cause in its report
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_accelerator(
    device: str,
    amp: str,
    *,
    accumulation: int = 1,
    mode: str = "ddp",
    timeout: float = 600.0,
    batch_size: int = 1,
    clip_grad: float | None = None,
) -> Accelerator:
    """accelerate's device, precision and processes.

    Args:
        device: "auto", "cpu", "cuda" or "npu".
        amp: "fp32", "bf16", "fp16", or "auto" for bf16 on an accelerator that supports it and fp32 elsewhere.
        accumulation: batches per step.
        mode: "ddp", "fsdp2" or "zero1" to "zero3".
        timeout: seconds that a collective operation may take.
        batch_size: pictures per process and batch; DeepSpeed wants to know.
        clip_grad: largest global gradient norm, which DeepSpeed sees to by itself.

    Raises:
        InputError: the device is not there, or cannot do the precision or the mode.
    """
    kind = select_device(device).type
    if amp == "auto":
        # GPUs before Ampere emulate bf16, slower than fp32
        native = kind != "cpu" and torch.get_device_module(kind).is_bf16_supported(including_emulation=False)
        amp = "bf16" if native else "fp32"
    if kind == "cpu" and amp == "fp16":
        raise InputError("train.amp: fp16 needs an accelerator; use bf16 or fp32 on the CPU.")
    # what `accelerate launch` was told of these is not in the recipe, nor what an earlier run of this process left
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    # accelerate keeps the precision of a process's first run; a second one has its own
    AcceleratorState._reset_state()
    deepspeed = None
    if mode.startswith("zero"):
        deepspeed = _deepspeed(kind, deepspeed_config(mode, amp, accumulation, batch_size, clip_grad))
    try:
        return Accelerator(
            cpu=kind == "cpu",
            mixed_precision="no" if amp == "fp32" or deepspeed else amp,
            # a plugin: the bare number yields to a variable of the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            deepspeed_plugin=deepspeed,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
                # gradients live where they are exchanged: one copy less of each. Not static_graph: nothing here needs
                # it, and it would fix which parameters take part.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        raise InputError(f"train.amp: {amp} does not work on this device: {error}") from None


def deepspeed_config(
    mode: str, amp: str, accumulation: int, batch_size: int, clip_grad: float | None
) -> dict[str, Any]:
    """DeepSpeed's settings for a stage of ZeRO (arXiv:1910.02054), complete: accelerate has nothing to fill in.

    bf16 is autocast, as under DDP: weights and gradients stay fp32, and checkpoints hold what the optimiser knows.
    """
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad or 0.0,
        "zero_optimization": {"stage": int(mode[-1]), "stage3_gather_16bit_weights_on_model_save": True},
        "torch_autocast": {"enabled": amp == "bf16", "dtype": "bfloat16"},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _deepspeed(kind: str, config: dict[str, Any]) -> DeepSpeedPlugin:
    mode = f"zero{config['zero_optimization']['stage']}"
    if kind == "cpu":
        raise InputError(f"parallel.mode: {mode} needs an accelerator; use ddp or fsdp2 on the CPU.")
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"parallel.mode: {mode} needs a launcher, also for one process: torchrun --nproc_per_node 1 ..."
        )
    if find_spec("deepspeed") is None:
        raise InputError(f"parallel.mode: {mode} needs DeepSpeed; run `pip install deepspeed`.")
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def check_shards(state: Mapping[str, Any], mode: str, processes: int) -> None:
    """
    Raises:
        InputError: the checkpoint of `state` is or would be DeepSpeed's, and of another mode or number of processes.
    """
    before = state["config"]["parallel"]["mode"]
    if "zero" in before + mode and (before, state["processes"]) != (mode, processes):
        raise InputError(
            f"output.resume: DeepSpeed's state fits its own mode and processes alone: {before} on "
            f"{state['processes']} there, {mode} on {processes} here. Go on with those, or begin a new run from the "
            "weights: --model.pretrained FILE."
        )


def precision(accelerator: Accelerator) -> str:
    """What the model computes in: "fp32", "bf16" or "fp16"."""
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        return "bf16" if plugin.deepspeed_config["torch_autocast"]["enabled"] else "fp32"
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def shard(model: Classifier, device: torch.device) -> None:
    """FSDP2: each block, then the rest, split over all processes in place.

    Every process must hold the same weights before. Blocks are the unit that is gathered for a forward pass.

    Raises:
        InputError: on the CPU, a PyTorch whose FSDP2 is for accelerators alone, as that of 2.6.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(
            f"parallel.mode: fsdp2 of PyTorch {torch.__version__} does not run on the CPU; use ddp, or a later PyTorch."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for stage in model.backbone.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, gathered from all processes, on the CPU; a collective call, and empty but on the first."""
    return get_model_state_dict(model, options=WHOLE)


def whole_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The same of the optimiser; its keys are the names of the parameters, so it fits any number of processes."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_whole_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    set_model_state_dict(model, dict(state), options=WHOLE)


def load_whole_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, dict(state), options=WHOLE)


def save_generators(path: Path, device: torch.device) -> None:
    """Write the states of this process's random generators."""
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 timm's mixup draws from it
    torch.save(
        {
            "python": random.getstate(),
            "numpy": (numpy_name, torch.from_numpy(numpy_keys.astype(np.int64)), *numpy_rest),
            "torch": torch.get_rng_state(),
            "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
        },
        path,
    )


def load_generators(path: Path, device: torch.device) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"], device)


class Roll:
    """Who takes part, so that a process that lost the others can say which of them is gone."""

    def __init__(self) -> None:
        self.members: list[tuple[int, str, int]] = gather_object(
            [(int(os.environ.get("RANK", 0)), socket.gethostname(), os.getpid())]
        )

    def missing(self) -> str:
        """The processes of this host that have ended or were stopped, for a message; empty where there is none."""
        host = socket.gethostname()
        found = [(rank, pid, _absence(pid)) for rank, where, pid in self.members if where == host]
        return ", ".join(f"rank {rank} (pid {pid}) {absence}" for rank, pid, absence in found if absence)


def _absence(pid: int) -> str | None:
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "ended"
    return {
        psutil.STATUS_ZOMBIE: "ended", psutil.STATUS_DEAD: "ended",
        psutil.STATUS_STOPPED: "was stopped", psutil.STATUS_TRACING_STOP: "was stopped",
    }.get(status)  # fmt: skip


class LostContactError(RuntimeError):
    """Another process of the job is gone, or does not answer."""


@contextlib.contextmanager
def contact(where: Callable[[], str]) -> Iterator[None]:
    """Turn what a collective operation raises when another process is gone into one line that names that process.

    Args:
        where: says how far the run is.

    Raises:
        LostContactError: see above.
    """
    roll = Roll()
    try:
        yield
    except RuntimeError as error:
        if not _means_lost_contact(error):
            raise
        reason = " ".join(str(error).split())[:200]
        deadline = time.monotonic() + PARTING
        while not (gone := roll.missing()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(HEAD_START)
        named = gone or "the launcher's report names the process that failed"
        raise LostContactError(f"lost contact with another process {where()}: {named} ({reason})") from error


def _means_lost_contact(error: RuntimeError) -> bool:
    if not torch.distributed.is_initialized():
        return False
    words = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo", "nccl", "hccl")
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)
