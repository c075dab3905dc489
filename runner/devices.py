"""Device, processes and precision of a run of MMEngine's."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed.nn  # now: imported while there is a group, its functions would keep that for ever
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from hvt_backbones.device import DISTRIBUTED_BACKENDS, select_device
from hvt_backbones.errors import InputError

from . import patches

TIMEOUT = 1800  # seconds that a collective operation may take, MMEngine's default


def use_device(name: str) -> torch.device:
    """Let MMEngine's models, checkpoints and autocast use the device `name`: "auto", "cpu", "cuda" or "npu".

    Raises:
        InputError: no such device here.
    """
    device = select_device(name)
    patches.use_device(device.type)
    return device


def join_processes(launcher: str, device: torch.device, cfg: Any) -> None:
    """Join the other processes of the job, over the backend of the device, and say so in `cfg`.

    MMEngine does it for NVIDIA's devices and, by torchrun, for the NPU; a CUDA build of torch on a machine without
    GPU makes it fail.

    Raises:
        InputError: the environment is not that of the launcher, or there are fewer devices than processes.
    """
    cfg.launcher = launcher
    if launcher == "none":
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError("there are several processes (WORLD_SIZE is set): add --launcher pytorch")
        return
    if launcher == "slurm":
        os.environ.update(_slurm_environment(os.environ))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if lacking := [name for name in names if name not in os.environ]:
        raise InputError(
            f"--launcher {launcher}: the environment lacks {', '.join(lacking)}: start the processes by torchrun"
        )
    if device.type == "cpu":
        wrapper = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        find_unused = cfg.get("find_unused_parameters", False)
        cfg.setdefault("model_wrapper_cfg", {**wrapper, "find_unused_parameters": find_unused})
    else:
        index, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if index >= count:
            raise InputError(f"process {index} of this machine has no device of its own, there are {count}: start less")
        torch.accelerator.set_device_index(index)
    seconds = cfg.get("env_cfg", {}).get("dist_cfg", {}).get("timeout", TIMEOUT)
    torch.distributed.init_process_group(DISTRIBUTED_BACKENDS[device.type], timeout=timedelta(seconds=float(seconds)))


def _slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from what `srun` sets."""
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NODELIST")
    if lacking := [name for name in names if name not in environment]:
        raise InputError(f"--launcher slurm: the environment lacks {', '.join(lacking)}: start the processes by srun")
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "MASTER_PORT": environment.get("MASTER_PORT", "29500"),
    }
    if "MASTER_ADDR" not in environment:
        command = ["scontrol", "show", "hostnames", environment["SLURM_NODELIST"]]
        try:
            hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(f"--launcher slurm: no first host from scontrol ({error}): set MASTER_ADDR") from error
        found["MASTER_ADDR"] = hosts[0]
    return found


def use_amp(cfg: Any, precision: str, device: torch.device, part: str) -> None:
    """Train in mixed precision.

    Args:
        cfg: the configuration, of which `optim_wrapper` is changed.
        precision: "bf16", "fp16", or "auto" for what the device's operators are made for: bf16 on the CPU, which has no
            loss scaling to offer for fp16; fp16 on CUDA and NPU, as mmcv's operators take no bf16.
        device: of the run.
        part: what bf16 is for, see `Bf16OptimWrapper`.

    Raises:
        InputError: fp16 on the CPU, or an optimiser wrapper that is neither of MMEngine's two.
    """
    wrapper = cfg.optim_wrapper
    if wrapper.get("type", "OptimWrapper") not in ("OptimWrapper", "AmpOptimWrapper", Bf16OptimWrapper.__name__):
        raise InputError(f"--amp: the optim_wrapper is a {wrapper['type']}, which has its own precision: leave it out")
    if precision == "auto":
        precision = "bf16" if device.type == "cpu" else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 needs an accelerator: give --amp bf16 on the CPU")
    for key in ("dtype", "loss_scale", "part"):
        wrapper.pop(key, None)
    if precision == "fp16":
        wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16")
    else:
        wrapper.update(type=Bf16OptimWrapper.__name__, part=part)


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Autocast to bf16, on any device: MMEngine's own wrapper refuses the CPU, and scales the loss as fp16 needs it.

    Args:
        part: the submodule that is autocast, "" for the whole model. Detectors autocast the backbone: mmcv's operators,
            NMS and RoIAlign, have no bf16. What the submodule returns is float32 again.
        **arguments: MMEngine's.
    """

    def __init__(self, *, part: str = "", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.part = part

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Around the forward pass of a training step."""
        module = getattr(model, "module", model).get_submodule(self.part)
        forward, kind = module.forward, next(module.parameters()).device.type

        def in_bf16(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(kind, torch.bfloat16):
                return _in_float32(forward(*args, **kwargs))

        module.forward = in_bf16
        try:
            with super().optim_context(model):
                yield
        finally:
            del module.forward


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _in_float32(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_in_float32(item) for item in value)
    return value
