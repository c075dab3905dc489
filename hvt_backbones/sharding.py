"""FSDP2 of a model: what is gathered at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .backbone import Backbone

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def fsdp2_runs_on_cpu() -> bool:
    """Whether this PyTorch's does: that of 2.6 is for accelerators alone."""
    return hasattr(torch.cpu.Stream, "record_event")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone, or of the backbone in a model, in order."""
    backbone = next(module for module in model.modules() if isinstance(module, Backbone))
    return [block for stage in backbone.stages for block in stage.blocks]


def shard_blocks(model: nn.Module, mesh: DeviceMesh, *, cpu_offload: bool = False) -> None:
    """Shard each block, then the rest, in place. Blocks are the unit that is gathered for a forward pass.

    Every process of the mesh must hold the same weights before, or a model on the meta device.

    Args:
        cpu_offload: shards, their gradients and so the optimiser stay on the CPU.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for part in (*blocks_of(model), model):
        fully_shard(part, mesh=mesh, offload_policy=policy)
