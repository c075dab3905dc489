"""What learns: a model, the average of its weights, its optimiser and its schedule, on the devices of a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hvt_backbones import Classifier, InputError, SimMIM, create_classifier, create_simmim
from hvt_backbones.model_file import Masking, metadata_of, record_windows
from hvt_backbones.sharding import blocks_of
from hvt_backbones.variants import find_variant

from . import distributed
from .checkpoint.shards import SHARDS, read_shards
from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SimmimConfig,
    TrainConfig,
)
from .data.loading import Batch, preprocessing
from .objective import Objective
from .signals import StopRequest

# States are gathered from all processes, on the CPU, under the parameters' names: they fit any number of processes.
# They are whole on the first process, and empty on the others.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
PART = StateDictOptions(cpu_offload=True)  # of each process its own
# Of an optimiser's groups: those of this run, not of its checkpoint, which may have others or another device's kernels.
OPTIMIZER_SETTINGS = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "foreach", "fused"}


@dataclass(frozen=True)
class Outcome:
    """What a step did.

    Attributes:
        loss: mean over the step's pictures of all processes.
        grad_norm: global L2 norm before clipping.
        applied: whether the weights changed: not where loss or gradient are no numbers.
        overflow: fp16 gradients that the next, smaller loss scale may save; `applied` is False then.
        stop: a signal has reached one of the processes.
        local_loss_is_bad: the loss of this process is no number.
    """

    loss: float
    grad_norm: float
    applied: bool
    overflow: bool
    stop: bool
    local_loss_is_bad: bool


@dataclass(eq=False)
class TrainStep:
    """One optimiser step over `accumulation` batches: forward, backward, clipping, and a look at what came out.

    Args:
        model: as `accelerator.prepare` or `fully_shard` leave it.
        optimizer: accelerate's.
        accelerator: with the number of batches per step.
        objective: the loss.
        clip_grad: largest global norm, or None.
    """

    model: Any
    optimizer: AcceleratedOptimizer
    accelerator: Accelerator
    objective: Objective
    _: KW_ONLY
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # DeepSpeed's engine clips and steps within `backward`
        self.engine_steps = hasattr(self.model, "zero_optimization_stage")

    def __call__(self, group: Sequence[Batch], stop: StopRequest | None = None) -> Outcome:
        """
        Args:
            group: `accumulation` batches.
            stop: looked at when the gradients are there.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for batch in group:
            with accelerator.accumulate(self.model):
                if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2's counterpart of DDP's no_sync
                    self.model.set_requires_gradient_sync(accelerator.sync_gradients)
                loss = self.objective.loss(self.model, batch, accelerator)
                accelerator.backward(loss)
            total += loss.detach()
        grad_norm = self._clip()
        # the one wait for the device, and in a job of several processes the one extra message, of a step
        asked = float(stop is not None and stop.number > 0)
        signs = torch.stack([total / len(group), torch.full_like(total, asked), grad_norm.to(total)])
        local_loss = signs[0].clone()
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(signs)
        mean_loss, stops, grad_norm_sum, local = torch.cat([signs, local_loss[None]]).tolist()
        mean_loss, norm = mean_loss / accelerator.num_processes, grad_norm_sum / accelerator.num_processes
        overflow = math.isfinite(mean_loss) and not math.isfinite(norm) and accelerator.scaler is not None
        applied = math.isfinite(mean_loss) and math.isfinite(norm)
        if applied or overflow:
            self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # it has unscaled these gradients, and waits to hear the end of it
        self.optimizer.zero_grad()
        return Outcome(mean_loss, norm, applied, overflow, stops > 0, not math.isfinite(local))

    def _clip(self) -> Tensor:
        if self.engine_steps:
            # a step that it passed over leaves the norm of the one before
            norm = math.nan if self.optimizer.step_was_skipped else self.model.get_global_grad_norm()
            return torch.as_tensor(norm)
        # without a limit the norm is still wanted: it tells whether the gradient is made of numbers
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip_grad or math.inf)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Learner:
    """A model and all that changes its weights, moved to this process's device, sharded or wrapped for the others.

    Args:
        model: the same on every process, on the CPU; or on the meta device, to be filled shard by shard.
        accelerator: accelerate's.
        objective: of the run.
        weights: of a model on the meta device, those of all on the first process.
        optimizer, schedule, train, parallel: sections of the run's configuration.
        global_batch: pictures of a step, of all processes.
        steps_per_epoch: optimiser steps.

    Attributes:
        model: the classifier, or the model of SimMIM, itself.
        objective: what it learns.
        wrapped: what is called to train it.
        ema: timm's average of its weights, or None.
        raw_optimizer: PyTorch's.
        optimizer: accelerate's.
        scheduler: timm's, which counts steps.
        train_step: trains on the batches of one step.
        mode: of `parallel`.
    """

    def __init__(
        self, model: Classifier | SimMIM, accelerator: Accelerator, objective: Objective, *,
        optimizer: OptimizerConfig, schedule: ScheduleConfig, train: TrainConfig, parallel: ParallelConfig,
        global_batch: int, steps_per_epoch: int, weights: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.accelerator, self.objective, self.mode = model, accelerator, objective, parallel.mode
        device = accelerator.device
        if weights is None:
            model.to(device)
        self.ema = None
        if train.ema_decay > 0:
            # its generator cannot be of the meta device: a copy of the model comes in afterwards
            first = model if weights is None else nn.Linear(1, 1, device=device)
            self.ema = ModelEmaV3(first, decay=train.ema_decay, use_warmup=True)
            if weights is not None:
                self.ema.module = copy.deepcopy(model).eval()
        if train.compile:
            # all blocks share one code, compiled anew for each width, shift and drop rate: PyTorch gives up after 8
            limits = torch._dynamo.config
            if hasattr(limits, "recompile_limit"):
                limits.recompile_limit = limits.accumulated_recompile_limit
            else:  # as PyTorch 2.6 calls them
                limits.cache_size_limit = limits.accumulated_cache_size_limit
            for block in blocks_of(model):
                block.compile()
        if weights is not None:
            for part in [model] if self.ema is None else [model, self.ema.module]:
                distributed.shard(part, device, weights, cpu_offload=parallel.cpu_offload)
        home = torch.device("cpu") if parallel.cpu_offload else device
        self.raw_optimizer = build_optimizer(optimizer, model, global_batch, home)
        scale = lr_scale(optimizer, global_batch)
        self.scheduler = build_scheduler(schedule, self.raw_optimizer, train.epochs, steps_per_epoch, scale)
        self.wrapped: Any  # of PyTorch or DeepSpeed, with methods of its own
        if weights is not None:
            self.wrapped, self.optimizer = model, accelerator.prepare(self.raw_optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(model, self.raw_optimizer)
        self.train_step = TrainStep(self.wrapped, self.optimizer, accelerator, objective, clip_grad=optimizer.clip_grad)
        # a DeepSpeed engine writes and reads its state itself
        self.engine_steps = self.train_step.engine_steps

    @property
    def evaluated(self) -> nn.Module:
        """The model whose weights are evaluated and saved: the average where there is one."""
        if self.ema is not None:
            return self.ema.module
        return self.wrapped if self.engine_steps else self.model

    @property
    def learning_rate(self) -> float:
        """The largest of the groups: that of the head, where layers decay."""
        return max(group["lr"] for group in self.raw_optimizer.param_groups)

    def step(self, group: Sequence[Batch], number: int, stop: StopRequest | None = None) -> Outcome:
        """The step of this `number`, from 1: the weights, their average, and the rate of the step after it."""
        outcome = self.train_step(group, stop)
        self.scheduler.step_update(number)
        if outcome.applied and self.ema is not None:
            self.ema.update(self.model, step=number)
        return outcome

    def weights(self, *, averaged: bool) -> dict[str, Any]:
        """The state dict of the model, or of its average where there is one; a collective call."""
        if self.mode == "zero3":
            return self.accelerator.get_state_dict(self.wrapped)
        model = self.ema.module if averaged and self.ema is not None else self.model
        return get_model_state_dict(model, options=WHOLE)

    def parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What lies in shards, this process's part of it: model, average and the tensors of the optimiser's state, by
        parameter; and what else the optimiser has, the same on all. A collective call.
        """
        tensors: dict[str, Any] = {"model": get_model_state_dict(self.model, options=PART)}
        if self.ema is not None:
            tensors["ema"] = get_model_state_dict(self.ema.module, options=PART)
        rest: dict[str, Any] = get_optimizer_state_dict(self.model, self.raw_optimizer, options=PART)
        moments = rest["state"]
        tensors["optimizer"] = {name: _choose(values, tensors=True) for name, values in moments.items()}
        return tensors, {**rest, "state": {name: _choose(values, tensors=False) for name, values in moments.items()}}

    def state(self, *, sharded: bool = False) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside what the engine writes; with `sharded` as `parts` what each process
        keeps by itself. A collective call.
        """
        scaler = self.accelerator.scaler
        found: dict[str, Any] = {"model": None, "ema": None, "optimizer": None}
        if sharded:
            found["parts"], found["optimizer"] = self.parts()
        else:
            found["model"] = self.weights(averaged=False)
            found["ema"] = None if self.ema is None else self.weights(averaged=True)
            if not self.engine_steps:
                found["optimizer"] = get_optimizer_state_dict(self.model, self.raw_optimizer, options=WHOLE)
        return {
            **found,
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def save_engine(self, folder: Path) -> None:
        """Let the engine write its state, if there is one; a collective call."""
        if self.engine_steps:
            self.wrapped.save_checkpoint(str(folder), tag="deepspeed")

    def restore(self, folder: Path, state: Mapping[str, Any], *, same_settings: bool) -> None:
        """Go back to the `state` of the checkpoint `folder`; a collective call.

        Args:
            same_settings: else the schedule stays this run's, and the checkpoint does not bring old rates back.

        Raises:
            InputError: the state does not fit.
        """
        scaler = self.accelerator.scaler
        own = [
            {key: group[key] for key in OPTIMIZER_SETTINGS & group.keys()} for group in self.raw_optimizer.param_groups
        ]
        try:
            options = WHOLE
            if (folder / SHARDS).is_dir():
                options, tensors, rest = PART, read_shards(folder / SHARDS, self.parts()[0]), state["optimizer"]
                moments = {name: values | rest["state"][name] for name, values in tensors["optimizer"].items()}
                state = {**state, **tensors, "optimizer": {**rest, "state": moments}}
            if self.engine_steps:
                self.wrapped.load_checkpoint(str(folder), tag="deepspeed")
            else:
                # before the weights: PyTorch makes a step, at a rate of 0, to have a state that it can fill
                set_optimizer_state_dict(self.model, self.raw_optimizer, state["optimizer"], options=options)
                set_model_state_dict(self.model, state["model"], options=options)
            if self.ema is not None:
                set_model_state_dict(self.ema.module, state["ema"] or state["model"], options=options)
            for group, settings in zip(self.raw_optimizer.param_groups, own, strict=True):
                group.update(settings)
            if same_settings:
                self.scheduler.load_state_dict(state["scheduler"])
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"output.resume: the checkpoint does not fit these settings: {error}") from None


def _choose(values: Mapping[str, Any], *, tensors: bool) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, Tensor) == tensors}


def model_overrides(model: ModelConfig, channels: int) -> dict[str, Any]:
    """The constructor arguments of the run's model: those of the recipe, and `in_chans` of its pictures."""
    return model.overrides | ({} if channels == 3 else {"in_chans": channels})


def describe_model(
    settings: ModelConfig,
    model: Classifier | SimMIM,
    data: DataConfig,
    class_names: Sequence[str],
    simmim: SimmimConfig | None,
) -> dict[str, str]:
    """The metadata from which `hvt predict` and `classification.validate` rebuild the model and its pictures."""
    overrides, name = model_overrides(settings, data.input_size[0]), find_variant(settings.name)[0].name
    if simmim is None:
        metadata = metadata_of(name, overrides, preprocessing(data), class_names=class_names)
    else:
        masking = Masking(simmim.mask_ratio, simmim.mask_patch_size, simmim.norm_target)
        metadata = metadata_of(name, overrides, preprocessing(data), masking=masking)
    return record_windows(metadata, model.backbone)


def build_model(
    settings: ModelConfig, channels: int, num_classes: int, simmim: SimmimConfig | None
) -> Classifier | SimMIM:
    """The model of a recipe, for the channels and classes of its pictures; with `simmim` that which paints."""
    overrides = model_overrides(settings, channels)
    model: Classifier | SimMIM
    try:
        if simmim is not None:
            model = create_simmim(
                settings.name, norm_target=simmim.norm_target, pretrained=settings.pretrained, **overrides
            )
        else:
            model = create_classifier(
                settings.name,
                num_classes=num_classes,
                pretrained=settings.pretrained,
                class_map=settings.class_map,
                **overrides,
            )
            model.freeze_stages(len(model.backbone.stages) if settings.freeze_backbone else settings.freeze_stages)
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.overrides: {settings.overrides} do not build a {settings.name}: {error}") from None
    model.set_grad_checkpointing(settings.grad_checkpointing)
    model.set_sequential_attention(settings.max_logits)
    return model


def lr_scale(settings: OptimizerConfig, global_batch: int) -> float:
    """The linear rule (arXiv:1706.02677): rates are stated for a batch, and grow with it."""
    stated = settings.lr_batch_size
    return 1.0 if stated is None else global_batch / stated


def build_optimizer(
    settings: OptimizerConfig, model: Classifier | SimMIM, global_batch: int, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimiser over the model's parameter groups, at the rate of the global batch."""
    # one kernel for all parameters where it is known to skip a step whose gradients overflowed in fp16, which is on
    # cuda: torch_npu's GradScaler hands itself to a fused optimiser, which takes no such argument, and the kernel
    # behind torch's own scaler (FSDP2's) ignores found_inf. Elsewhere the same arithmetic on lists: one by one,
    # FSDP2's shards take most of a small model's step
    kernel: dict[str, Any] = {}
    if settings.name in ("adamw", "adam"):
        kernel = {"fused": True} if device.type == "cuda" else {"foreach": True}
    try:
        return create_optimizer_v2(
            model.param_groups(weight_decay=settings.weight_decay, layer_decay=settings.layer_decay),
            opt=settings.name,
            lr=settings.lr * lr_scale(settings, global_batch),
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            **kernel,
        )
    except (TypeError, ImportError) as error:
        raise InputError(f"optimizer.name: {settings.name} cannot be built with these settings: {error}") from None


def build_scheduler(
    settings: ScheduleConfig, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int, scale: float
) -> Scheduler:
    """timm's schedule, by steps; `scale` is that of the learning rate."""
    # "constant" by its own name came to timm late
    sched = {"linear": "poly", "constant": "step"}.get(settings.name, settings.name)
    rates = {"poly": 0.1, "multistep": 0.1}  # of "poly" the power
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs,
        decay_rate=rates.get(settings.name, 1.0),
        decay_milestones=list(settings.milestones),
        warmup_epochs=warmup_epochs(settings, epochs),
        warmup_lr=settings.warmup_lr * scale,
        min_lr=settings.min_lr * scale,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def warmup_epochs(settings: ScheduleConfig, epochs: int) -> int:
    """A run shorter than its recipe's warm-up, such as a first try, warms up until its last epoch."""
    return min(settings.warmup_epochs, epochs - 1)
