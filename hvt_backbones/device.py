"""The kinds of devices that models run on, and the choice among them. Nothing is probed at import."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch

from .errors import InputError

# the kinds that models run on -> the backend of `torch.distributed` that serves each
DISTRIBUTED_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


def select_device(name: str = "auto") -> torch.device:
    """The device called `name`, checked to exist.

    Args:
        name: "auto" for the machine's accelerator, or the CPU where there is none; "cpu", "cuda" or "npu", with an
            index where there are several ("cuda:1").

    Raises:
        InputError: no such device here; the message says what is missing.
    """
    if name == "auto":
        # torch has loaded torch_npu by itself, unless it was told not to by TORCH_DEVICE_BACKEND_AUTOLOAD=0;
        # the CPU also where the accelerator is one that nothing here was written for
        accelerator = _accelerator()
        if accelerator is not None and accelerator.type in DISTRIBUTED_BACKENDS:
            return accelerator
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in DISTRIBUTED_BACKENDS or (index and not index.isdecimal()):
        raise InputError(
            f"unknown device {name!r}: choose auto, {', '.join(DISTRIBUTED_BACKENDS)}, or for example cuda:1"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu" and not _import_torch_npu():
        raise InputError(
            "device npu needs the torch_npu package, which is not installed: install the release that matches your "
            "torch and CANN versions, or choose cpu"
        )
    accelerator = _accelerator()
    if accelerator is None or accelerator.type != kind:
        reason = f"its accelerator is {accelerator.type}" if accelerator else "torch sees no accelerator"
        raise InputError(f"device {name!r} is not on this machine: {reason}; choose auto or cpu, or see `hvt doctor`")
    if index and int(index) >= torch.accelerator.device_count():
        count = torch.accelerator.device_count()
        raise InputError(f"device {name!r} is not on this machine, which has {count}: {kind}:0 to {kind}:{count - 1}")
    return torch.device(kind, int(index)) if index else torch.device(kind)


def _accelerator() -> torch.device | None:
    """The machine's, of whatever kind. torch 2.6 raises where there is none, and knows no `check_available`."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _import_torch_npu() -> bool:
    """Register the NPU with torch; its import is what makes `torch.accelerator` see it.

    Raises:
        InputError: torch_npu is installed and cannot be imported.
    """
    if find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:  # no CANN, no driver, or made for another torch
        raise InputError(f"device npu: torch_npu cannot be loaded: {error}; `hvt doctor --npu` says why") from None
    return True
