"""A command of segmentation, in a process that has the stand-in NPU: `on_standin_npu.py CONFIG ...` trains."""

from __future__ import annotations

import sys
import types

import torch


def complete_standin() -> None:
    """What MMEngine asks of the real torch_npu when it is imported, and the stand-in does not have."""
    utils = types.ModuleType("torch_npu.npu.utils")
    utils.get_soc_version = lambda: 220
    sys.modules[utils.__name__] = torch.npu.utils = utils
    torch.npu.set_compile_mode = lambda jit_compile: None
    torch.npu.BoolTensor, torch.npu.LongTensor = torch.BoolTensor, torch.LongTensor


if __name__ == "__main__":
    complete_standin()
    from segmentation.train import main

    status = main(sys.argv[1:])
    print(f"peak memory {torch.npu.max_memory_allocated()}")
    sys.exit(status)
