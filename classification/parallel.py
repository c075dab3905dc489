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
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
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

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def build_accelerator(
    device: str, amp: str, *, accumulation: int = 1, mode: str = "ddp", timeout: float = 600.0
) -> Accelerator:
    """accelerate's device, precision and processes.

    Args:
        device: "auto", "cpu", "cuda" or "npu".
        amp: "fp32", "bf16", "fp16", or "auto" for bf16 on an accelerator that supports it and fp32 elsewhere.
        accumulation: batches per step.
        mode: "ddp", "fsdp2" or "zero1" to "zero3".
        timeout: seconds that a collective operation may take.

    Raises:
        InputError: the device is not there, or cannot do the precision or the mode.
    """
    kind = select_device(device).type
    if amp == "auto":
        amp = "bf16" if kind != "cpu" and torch.get_device_module(kind).is_bf16_supported() else "fp32"
    if kind == "cpu" and amp == "fp16":
        raise InputError("train.amp: fp16 needs an accelerator; use bf16 or fp32 on the CPU.")
    # accelerate keeps the precision of a process's first run; a second one has its own
    AcceleratorState._reset_state()
    try:
        return Accelerator(
            cpu=kind == "cpu",
            mixed_precision="no" if amp == "fp32" else amp,
            gradient_accumulation_steps=accumulation,
            deepspeed_plugin=_deepspeed(kind, mode, accumulation) if mode.startswith("zero") else None,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
        )
    except ValueError as error:
        raise InputError(f"train.amp: {amp} does not work on this device: {error}") from None


def _deepspeed(kind: str, mode: str, accumulation: int) -> DeepSpeedPlugin:
    if kind == "cpu":
        raise InputError(f"parallel.mode: {mode} needs an accelerator; use ddp or fsdp2 on the CPU.")
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"parallel.mode: {mode} needs a launcher, also for one process: torchrun --nproc_per_node 1 ..."
        )
    try:
        return DeepSpeedPlugin(
            zero_stage=int(mode[-1]), gradient_accumulation_steps=accumulation, zero3_init_flag=False
        )
    except ImportError:
        raise InputError(f"parallel.mode: {mode} needs DeepSpeed; run `pip install deepspeed`.") from None


def shard(model: Classifier, device: torch.device) -> None:
    """FSDP2: each block, then the rest, split over all processes in place.

    Every process must hold the same weights before. Blocks are the unit that is gathered for a forward pass.
    """
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


def leave() -> None:
    """Part from the other processes without waiting for any that is gone."""
    if torch.distributed.is_initialized():
        # what PyTorch would say of a process that ends without it is about itself, not about the run
        with contextlib.suppress(RuntimeError, ValueError):
            torch.distributed.destroy_process_group()


class Roll:
    """Who takes part, so that a process that lost the others can say which of them is gone."""

    def __init__(self) -> None:
        self.members: list[tuple[int, str, int]] = gather_object(
            [(int(os.environ.get("RANK", 0)), socket.gethostname(), os.getpid())]
        )

    def missing(self) -> str:
        """The processes of this host that have ended, as text for a message; empty where none has."""
        host = socket.gethostname()
        gone = [f"rank {rank} (pid {pid})" for rank, where, pid in self.members if where == host and not _alive(pid)]
        return ", ".join(gone)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


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
        time.sleep(1.0)  # a process that is ending takes a moment
        gone = roll.missing()
        named = f"{gone} ended" if gone else "the launcher's report names the process that failed"
        raise LostContactError(f"lost contact with another process {where()}: {named} ({reason})") from error


def _means_lost_contact(error: RuntimeError) -> bool:
    if not torch.distributed.is_initialized():
        return False
    words = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo", "nccl", "hccl")
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)
