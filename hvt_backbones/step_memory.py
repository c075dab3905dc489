"""The memory of one training step, tracked while the real model takes the step on fake tensors.

Nothing is computed and nothing allocated: `FakeTensorMode` gives every operation's results their shapes alone, and
PyTorch's `MemTracker` sees each of them come and go. Over several devices the model is really sharded by `fully_shard`,
over a process group that only pretends to have others (`FakeStore`), and `FSDPMemTracker` also tells what is gathered.

Fake tensors are on the CPU, for autograd of another kind of device needs one. A step on a GPU is tracked with what
CUDA does otherwise than the CPU (`CudaKernels`); a step on the CPU takes the CPU's own attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_pre_hook

from .create import create_backbone, create_classifier
from .ops.eager import pretend

TASKS = ("classification", "detection", "video")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the highest point of a step, and those that it sends in one.

    Attributes:
        parameters, gradients, optimizer: what is kept of each; with shards, this device's.
        activations: tensors of the forward and the backward pass, images included.
        communication: parameters gathered from the other devices, and buffers of what is exchanged.
        traffic: bytes that each device sends in a step; not part of the total.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    communication: int = 0
    traffic: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communication


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one device trains on in a step of AdamW.

    Attributes:
        name: of a model.
        task: "classification", of images; "video", of clips; "detection", the backbone alone, of images: its maps are
            given gradients, as a neck would, and neck and heads are not there.
        size: (H, W) of an image, (T, H, W) of a clip.
        batch: images or clips.
        precision: "fp32", or "bf16" by autocast with weights, gradients and optimiser in float32.
        device: whose kernels are taken, "cuda" or "cpu".
    """

    name: str
    task: str
    size: tuple[int, ...]
    batch: int
    precision: str
    device: str


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """What CUDA's autocast does and the CPU's does not, of all that our models call."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if isinstance(module, nn.LayerNorm) and torch.is_autocast_enabled("cpu"):
            return (inputs[0].float(),)
        return None

    handle = register_module_forward_pre_hook(widen)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _pretended_group(devices: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _PeakAlone:
    """Of a tracker: no peaks of each module, for which it would go through all of them after every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, snapshot in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < snapshot["Total"]:
                self._peak_mem[device] = snapshot["Total"]
                self._peak_mem_snap[device] = snapshot.copy()


def _replicated_tracker(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Any:
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(_PeakAlone, MemTracker):
        pass

    tracker = Tracker()
    tracker.track_external(model, optimizer, images)
    return tracker


def _sharded_tracker(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Any:
    from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    class Tracker(_PeakAlone, FSDPMemTracker):
        exchanged = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs or {})
            if func in collective_ops - sync_ops:
                self.exchanged += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs or {})
            return result

    tracker = Tracker(model, optimizer)
    tracker.track_inputs((images,))
    return tracker


def track(step: Step, *, recompute: str | bool, devices: int, sharded: bool) -> Memory:
    """Memory of the second and every later step, once the optimiser has its state.

    Args:
        recompute: as `Backbone.set_grad_checkpointing` takes it.
        devices: that train together, `step.batch` images on each.
        sharded: by FSDP2, each block and then the rest, as the trainer does; else with several devices as DDP, whose
            gradients stay allocated in the buckets in which they are exchanged.

    Raises:
        InputError: the model, or a size that it does not take.
    """
    with torch.device("meta"):
        model = create_backbone(step.name) if step.task == "detection" else create_classifier(step.name)
    model.set_grad_checkpointing(recompute)
    with ExitStack() as stack:
        mesh = None
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh

            stack.enter_context(_pretended_group(devices))
            mesh = init_device_mesh("cpu", (devices,))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(pretend(step.device))
        if step.device == "cuda":
            stack.enter_context(_norms_in_float32())
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        if mesh is not None:
            _shard(model, mesh)
        kernel = {"fused": True} if step.device == "cuda" else {"foreach": True}
        optimizer = torch.optim.AdamW(model.parameters(), **kernel)
        _set_gradients(model)
        optimizer.step()
        if sharded or devices == 1:
            optimizer.zero_grad()
        images = torch.empty(step.batch, 3, *step.size)
        tracker = (_sharded_tracker if sharded else _replicated_tracker)(model, optimizer, images)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=step.precision == "bf16"):
                outputs = model(images)
            _backward(outputs)
            del outputs
            optimizer.step()
        snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return snapshot


def _shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    backbone = getattr(model, "backbone", model)
    for stage in backbone.stages:
        for block in stage.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _set_gradients(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _backward(outputs):
    if isinstance(outputs, Tensor):
        classes = torch.zeros(len(outputs), dtype=torch.long)
        torch.autograd.backward(F.cross_entropy(outputs.float(), classes))
    else:
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
