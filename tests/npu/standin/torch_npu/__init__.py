"""A stand-in for torch_npu where there is no NPU: importing it gives this process `npu` devices made of host memory.

It has the names and signatures of the real package that PyTorch, accelerate, MMEngine and this project use, no more.
Tests put the folder above on `PYTHONPATH`; it is never installed. A process cannot take the device back, so that each
test that needs it has a process of its own. `NPU_STANDIN_DEVICES` says how many devices there are (default 2).

It shows that a tensor is on the wrong device, that a name or a hook is missing, that random numbers, autocast, memory,
processes and files go the accelerator's way. It says nothing about what only the hardware knows: its kernels and their
rounding, which types and operators they have, speed, work that runs asynchronously, and running out of memory.
"""

from __future__ import annotations

import os
from datetime import timedelta

_autoloads = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch would load this half-imported package

import torch  # noqa: E402
import torch.distributed  # noqa: E402

from . import _build  # noqa: E402

_C = _build.load()

from . import npu  # noqa: E402 - asks for the devices

__version__ = torch.__version__.partition("+")[0]

torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = _autoloads


def _autoload() -> None:
    """What `import torch` calls, after the import above has done everything."""


def _create_hccl(
    store: torch.distributed.Store, rank: int, size: int, timeout: timedelta
) -> torch._C._distributed_c10d.Backend:
    return _C.hccl_over(torch.distributed.ProcessGroupGloo(store, rank, size, timeout))


torch.distributed.Backend.register_backend("hccl", _create_hccl, devices=["npu"])
