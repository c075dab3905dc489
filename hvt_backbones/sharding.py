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


def shard_blocks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard each block, then the rest, in place. Blocks are the unit that is gathered for a forward pass.

    Every process of the mesh must hold the same weights before.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
