"""Devices, precision and processes: accelerate's, and PyTorch's own for FSDP2.

accelerate shards with FSDP2 on accelerators alone, so `fully_shard` is called here: one path, the same with gloo on
the CPU as with nccl or hccl.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed.nn  # now: imported while there is a group, its functions would keep that for ever
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from hvt_backbones import InputError
from hvt_backbones.device import DISTRIBUTED_BACKENDS, select_device
from hvt_backbones.sharding import fsdp2_runs_on_cpu, shard_blocks

from .config import ParallelConfig, TrainConfig


def build_accelerator(
    train: TrainConfig, parallel: ParallelConfig, *, batch_size: int = 1, clip_grad: float | None = None
) -> Accelerator:
    """accelerate's device, precision and processes.

    Args:
        train, parallel: sections of the configuration.
        batch_size: pictures per process and batch; DeepSpeed wants to know.
        clip_grad: largest global gradient norm, which DeepSpeed sees to by itself.

    Raises:
        InputError: the device is not there, or cannot do the precision or the mode.
    """
    kind, amp, mode = select_device(train.device).type, train.amp, parallel.mode
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
    if parallel.cpu_offload:
        _open_group_of_both(kind, parallel)
    deepspeed = None
    if mode.startswith("zero"):
        deepspeed = _deepspeed(kind, mode, amp, train.accumulation, batch_size, clip_grad)
    try:
        return Accelerator(
            cpu=kind == "cpu",
            mixed_precision="no" if amp == "fp32" or deepspeed else amp,
            # a plugin: the bare number yields to a variable of the environment
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.accumulation),
            deepspeed_plugin=deepspeed,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(seconds=parallel.timeout)),
                # gradients live where they are exchanged: one copy less of each. Not static_graph: nothing here needs
                # it, and it would fix which parameters take part.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
        )
    except ValueError as error:
        raise InputError(f"train.amp: {amp} does not work on this device: {error}") from None


def _deepspeed(
    kind: str, mode: str, amp: str, accumulation: int, batch_size: int, clip_grad: float | None
) -> DeepSpeedPlugin:
    """A stage of ZeRO (arXiv:1910.02054); the settings are complete: accelerate has nothing to fill in.

    bf16 is autocast, as under DDP: weights and gradients stay fp32, and checkpoints hold what the optimiser knows.
    """
    if kind == "cpu":
        raise InputError(f"parallel.mode: {mode} needs an accelerator; use ddp or fsdp2 on the CPU.")
    if "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"parallel.mode: {mode} needs a launcher, also for one process: torchrun --nproc_per_node 1 ..."
        )
    if find_spec("deepspeed") is None:
        raise InputError(f"parallel.mode: {mode} needs DeepSpeed; run `pip install deepspeed`.")
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_grad or 0.0,
        "zero_optimization": {"stage": int(mode[-1]), "stage3_gather_16bit_weights_on_model_save": True},
        "torch_autocast": {"enabled": amp == "bf16", "dtype": "bfloat16"},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _open_group_of_both(kind: str, parallel: ParallelConfig) -> None:
    """Processes that talk on their devices and, as the norm of gradients on the CPU wants it, on the CPU.

    accelerate would open a group of one kind; it takes one that is there.
    """
    if kind == "cpu":
        raise InputError("parallel.cpu_offload: everything is on the CPU already; leave it out, or use an accelerator.")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise InputError("parallel.cpu_offload: needs several processes: torchrun --nproc_per_node 2 ...")
    if not torch.distributed.is_initialized():
        backend = f"{kind}:{DISTRIBUTED_BACKENDS[kind]},cpu:{DISTRIBUTED_BACKENDS['cpu']}"
        torch.distributed.init_process_group(backend, timeout=timedelta(seconds=parallel.timeout))


def precision(accelerator: Accelerator) -> str:
    """What the model computes in: "fp32", "bf16" or "fp16"."""
    if (plugin := accelerator.state.deepspeed_plugin) is not None:
        return "bf16" if plugin.deepspeed_config["torch_autocast"]["enabled"] else "fp32"
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def is_sharded(accelerator: Accelerator, parallel: ParallelConfig) -> bool:
    """Whether weights, gradients and optimiser will lie in FSDP2's shards, see `shard`."""
    return parallel.mode == "fsdp2" and accelerator.num_processes > 1


def shard(model: nn.Module, device: torch.device, weights: Mapping[str, Tensor], *, cpu_offload: bool) -> None:
    """FSDP2: `shard_blocks` over all processes, of a model on the meta device, in place.

    Args:
        model: the same on every process.
        device: of this process.
        weights: of the first process, all of the model's; tensor by tensor each process gets its part of them.
        cpu_offload: its part stays on the CPU.

    Raises:
        InputError: on the CPU, a PyTorch whose FSDP2 is for accelerators alone, as that of 2.6.
    """
    if device.type == "cpu" and not fsdp2_runs_on_cpu():
        raise InputError(
            f"parallel.mode: fsdp2 of PyTorch {torch.__version__} does not run on the CPU; use ddp, or a later PyTorch."
        )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    shard_blocks(model, mesh, cpu_offload=cpu_offload)
    model.to_empty(device="cpu" if cpu_offload else device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)
