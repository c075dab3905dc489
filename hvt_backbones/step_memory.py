"""The memory of one training step, tracked while the real model takes the step on fake tensors.

Nothing is computed and nothing allocated: under `FakeTensorMode` results have a shape and no numbers, and PyTorch's
`MemTracker` sees each of them come and go. Where the model is sharded, it really is, by `fully_shard` over a process
group without the other processes (`FakeStore`), and `FSDPMemTracker` tells also what is gathered and exchanged.

The fake tensors are on the CPU: autograd needs the driver of any other device. So that a step on a GPU is tracked as it
runs there, models take CUDA's attention inside `ops.eager.pretend`, and norms are in float32 under autocast as on CUDA.
Neither knows a CUDA device's own needs: its context, the workspaces of its libraries, fragments of its allocator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from .backbone import Backbone
from .classifier import Classifier
from .create import create_backbone, create_classifier, create_simmim
from .errors import InputError
from .ops.eager import pretend
from .sharding import shard_blocks
from .simmim import SimMIM

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# the trackers' words for what is alive -> ours; all others are tensors of the forward and the backward pass
TRAINED_HERE = ("classification", "simmim")  # by this repository's trainer, and not by OpenMMLab's
KINDS = {
    **dict.fromkeys(("Parameter", "Buffer", "Sharded Param"), "parameters"),
    **dict.fromkeys(("Gradient", "Sharded Grad"), "gradients"),
    **dict.fromkeys(("Optstate", "OptState"), "optimizer"),
    **dict.fromkeys(("Unsharded Param", "Unsharded Grad", "All Gather", "Reduce Scatter"), "communication"),
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the highest point of a step, and those that it exchanges in the step.

    Attributes:
        parameters, gradients, optimizer: what is kept of each on this device.
        activations: tensors of the forward and the backward pass, the images and what operations need for themselves;
            with shards also the gradients of a block until they are exchanged.
        communication: what is gathered of the other devices' parameters, and buffers.
        traffic: sent and received by this device in a step, either way as much; no part of `total`.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    communication: int = 0
    traffic: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.communication


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of AdamW on one device: weights, gradients and optimiser in float32, as the trainers have them.

    Attributes:
        name: of a model.
        task: "classification" of images, "simmim", "video": of clips, or "detection": the backbone alone, whose maps
            are given gradients as by a neck; neck and heads are not there.
        size: (H, W) of an image, (T, H, W) of a clip.
        batch: images or clips.
        precision: "fp32", or "bf16" by autocast.
        device: whose operations are taken, "cuda" or "cpu".
        max_logits: see `Backbone.set_sequential_attention`.
        window_size: tokens along a side of a window, other than the model's.
    """

    name: str
    task: str
    size: tuple[int, ...]
    batch: int
    precision: str
    device: str
    max_logits: int | None = None
    window_size: int | None = None

    def model(self) -> Backbone | Classifier | SimMIM:
        """Its model, in training."""
        create: Any = {"detection": create_backbone, "simmim": create_simmim}.get(self.task, create_classifier)
        overrides: dict[str, Any] = {} if self.window_size is None else {"window_size": self.window_size}
        model = create(self.name, **overrides)
        model.set_sequential_attention(self.max_logits)
        return model

    def run(self, model: nn.Module, images: Tensor) -> None:
        """Forward and backward; the gradients are left in the model's parameters."""
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")
        if isinstance(model, SimMIM):
            mask = torch.ones(self.batch, *(side // model.patch_size for side in self.size), dtype=torch.bool)
            with autocast:
                painted = model(images, mask)
            model.loss(images, painted, mask).backward()
            return
        with autocast:
            outputs = model(images)
        if self.task == "detection":
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
        else:
            classes = torch.zeros(len(outputs), dtype=torch.long)
            F.cross_entropy(outputs.float(), classes).backward()

    def optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Of these, with its state, which the first step makes; their gradients are there."""
        fused = self.device == "cuda"  # as the trainer chooses
        optimizer = torch.optim.AdamW(parameters, fused=fused, foreach=not fused)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return optimizer


def track(step: Step, *, recompute: str | None = None, devices: int = 1, sharded: bool = False) -> Memory:
    """Memory of a step, other than the first, in which the optimiser has no state yet.

    Args:
        recompute: as `Backbone.set_grad_checkpointing` takes it; None for nothing.
        devices: that train together, each as `step` says.
        sharded: by FSDP2, as `shard_blocks` does it. Else several devices are those of DDP, which keeps the buckets in
            which gradients are exchanged: the trainer's gradients are views of them, MMEngine's stand beside them.

    Raises:
        InputError: no such model, or no size for it.
    """
    with torch.device("meta"):
        model = step.model()
    model.set_grad_checkpointing(recompute or False)
    with ExitStack() as stack:
        mesh = stack.enter_context(_pretended_mesh(devices)) if sharded else None
        stack.enter_context(FakeTensorMode())
        stack.enter_context(pretend(step.device))
        if step.device == "cuda":
            stack.enter_context(_norms_in_float32())
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        if mesh is not None:
            shard_blocks(model, mesh)
        own = [_own(parameter) for parameter in model.parameters()]
        optimizer = step.optimizer(own)
        views = devices > 1 and not sharded and step.task in TRAINED_HERE
        if not views:
            optimizer.zero_grad()
        images = torch.empty(step.batch, 3, *step.size)
        with (_sharded_tracker if sharded else _tracker)(model, optimizer, images) as tracker:
            step.run(model, images)
            for parameter, shard in zip(model.parameters(), own, strict=True):
                if shard is not parameter:
                    shard.grad = _own(parameter.grad)
            optimizer.step()
        memory = dict.fromkeys((*set(KINDS.values()), "activations"), 0)
        for kind, count in tracker.get_tracker_snapshot("peak")[images.device].items():
            if kind != "Total":
                memory[KINDS.get(kind.value, "activations")] += count
        weights = sum(parameter.nbytes for parameter in own)
        if devices > 1 and not sharded and not views:
            memory["communication"] = weights
        traffic = tracker.exchanged if sharded else 2 * weights
        return Memory(**memory, traffic=traffic * (devices - 1) // devices)


@contextmanager
def _pretended_mesh(devices: int) -> Iterator[DeviceMesh]:
    """A mesh of this process and others that never answer and are never waited for."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise InputError(
            "a plan needs a process group of its own, and this process is in one: make it before, or apart"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=devices)
    try:
        yield init_device_mesh("cpu", (devices,))
    finally:
        dist.destroy_process_group()


@contextmanager
def _norms_in_float32() -> Iterator[None]:
    """What CUDA's autocast does and the CPU's does not, of all that our models call."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if isinstance(module, nn.LayerNorm) and torch.is_autocast_enabled("cpu"):
            return (inputs[0].float(),)
        return None

    handle = register_module_forward_pre_hook(widen)  # type: ignore[arg-type] # whose type returns nothing
    try:
        yield
    finally:
        handle.remove()


def _own(x: Tensor | None) -> Tensor:
    """This device's part of a tensor that is sharded: an update of whole ones would first try out their shapes here."""
    assert x is not None
    return x.to_local().detach() if isinstance(x, DTensor) else x


class _PeakAlone:
    """For a tracker: no peak of each module, for which it goes through all of them after every operation."""

    _curr_mem_snap: dict[torch.device, dict[Any, int]]
    _peak_mem_snap: dict[torch.device, dict[Any, int]]
    _peak_mem: dict[torch.device, int]

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, alive in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < alive["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = alive["Total"], alive.copy()


def _tracker(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Any:
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
        exchanged = 0  # bytes of what is gathered, and of what is reduced, in whole

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func in collective_ops and func not in sync_ops:
                self.exchanged += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
            return result

    tracker = Tracker(model, optimizer)
    tracker.track_inputs((images,))
    return tracker
