"""What learns: a model, the average of its weights, its optimiser and its schedule, on the devices of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from hvt_backbones import Classifier, InputError, create_classifier

from . import distributed
from .checkpoint.files import model_overrides
from .config import AugmentationConfig, ModelConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, TrainConfig
from .engine import TrainStep

# Of an optimiser's groups: those of this run, not of its checkpoint, which may have others or another device's kernels.
OPTIMIZER_SETTINGS = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "foreach", "fused"}


class Learner:
    """A model and all that changes its weights, moved to this process's device, sharded or wrapped for the others.

    Args:
        model: the same on every process, on the CPU.
        accelerator: accelerate's.
        optimizer, schedule, augmentation, train, parallel: sections of the run's configuration.
        num_classes: of the targets.
        global_batch: pictures of a step, of all processes.
        steps_per_epoch: optimiser steps.

    Attributes:
        model: the classifier itself.
        wrapped: what is called to train it.
        ema: timm's average of its weights, or None.
        raw_optimizer: PyTorch's.
        optimizer: accelerate's.
        scheduler: timm's, which counts steps.
        train_step: trains on the batches of one step.
        mode: of `parallel`.
    """

    def __init__(
        self, model: Classifier, accelerator: Accelerator, *, optimizer: OptimizerConfig, schedule: ScheduleConfig,
        augmentation: AugmentationConfig, train: TrainConfig, parallel: ParallelConfig, num_classes: int,
        global_batch: int, steps_per_epoch: int,
    ) -> None:  # fmt: skip
        self.model, self.accelerator, self.mode = model, accelerator, parallel.mode
        device = accelerator.device
        model.to(device)
        self.ema = None
        if train.ema_decay > 0:
            self.ema = ModelEmaV3(model, decay=train.ema_decay, use_warmup=True)
        sharded = self.mode == "fsdp2" and accelerator.num_processes > 1
        if train.compile:
            # all blocks share one code, compiled anew for each width, shift and drop rate: PyTorch gives up after 8
            limits = torch._dynamo.config
            if hasattr(limits, "recompile_limit"):
                limits.recompile_limit = limits.accumulated_recompile_limit
            else:  # as PyTorch 2.6 calls them
                limits.cache_size_limit = limits.accumulated_cache_size_limit
            for stage in model.backbone.stages:
                for block in stage.blocks:
                    block.compile()
        if sharded:
            distributed.shard(model, device)
            if self.ema is not None:
                distributed.shard(self.ema.module, device)
        self.raw_optimizer = build_optimizer(optimizer, model, global_batch, device)
        scale = lr_scale(optimizer, global_batch)
        self.scheduler = build_scheduler(schedule, self.raw_optimizer, train.epochs, steps_per_epoch, scale)
        if sharded:
            self.wrapped, self.optimizer = model, accelerator.prepare(self.raw_optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(model, self.raw_optimizer)
        self.train_step = TrainStep(
            self.wrapped,
            self.optimizer,
            accelerator,
            label_smoothing=augmentation.label_smoothing,
            mixup=build_mixup(augmentation, num_classes),
            clip_grad=optimizer.clip_grad,
        )
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

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of `model` or of its average; a collective call."""
        if self.mode == "zero3":
            return self.accelerator.get_state_dict(self.wrapped)
        return distributed.whole_model_state(self.model if model is self.wrapped else model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, beside what the engine writes; a collective call."""
        scaler = self.accelerator.scaler
        return {
            "model": self.weights(self.model),
            "ema": None if self.ema is None else self.weights(self.ema.module),
            "optimizer": (
                None if self.engine_steps else distributed.whole_optimizer_state(self.model, self.raw_optimizer)
            ),
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
            if self.engine_steps:
                self.wrapped.load_checkpoint(str(folder), tag="deepspeed")
            else:
                # before the weights: PyTorch makes a step, at a rate of 0, to have a state that it can fill
                distributed.load_whole_optimizer_state(self.model, self.raw_optimizer, state["optimizer"])
                distributed.load_whole_model_state(self.model, state["model"])
            if self.ema is not None:
                distributed.load_whole_model_state(self.ema.module, state["ema"] or state["model"])
            for group, settings in zip(self.raw_optimizer.param_groups, own, strict=True):
                group.update(settings)
            if same_settings:
                self.scheduler.load_state_dict(state["scheduler"])
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"output.resume: the checkpoint does not fit these settings: {error}") from None


def build_model(settings: ModelConfig, channels: int, num_classes: int) -> Classifier:
    """The model of a recipe, for the channels and classes of its pictures."""
    try:
        model = create_classifier(
            settings.name,
            num_classes=num_classes,
            pretrained=settings.pretrained,
            class_map=settings.class_map,
            **model_overrides(settings, channels),
        )
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.overrides: {settings.overrides} do not build a {settings.name}: {error}") from None
    model.freeze_stages(len(model.backbone.stages) if settings.freeze_backbone else settings.freeze_stages)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    return model


def lr_scale(settings: OptimizerConfig, global_batch: int) -> float:
    """The linear rule (arXiv:1706.02677): rates are stated for a batch, and grow with it."""
    stated = settings.lr_batch_size
    return 1.0 if stated is None else global_batch / stated


def build_optimizer(
    settings: OptimizerConfig, model: Classifier, global_batch: int, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimiser over the model's parameter groups, at the rate of the global batch."""
    # one kernel for all parameters where it is known to skip a step whose gradients overflowed in fp16, which is on
    # cuda: torch_npu's GradScaler hands itself to a fused optimiser, which takes no such argument, and the kernel
    # behind torch's own scaler (FSDP2's) ignores found_inf. Elsewhere the same arithmetic on lists: one by one,
    # FSDP2's shards take most of a small model's step
    kernel = {}
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
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=epochs,
        decay_rate=0.1 if settings.name == "poly" else 1.0,  # of "poly" the power
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


def build_mixup(mix: AugmentationConfig, num_classes: int) -> Mixup | None:
    if not mix.mixes:
        return None
    return Mixup(
        mix.mixup,
        mix.cutmix,
        prob=mix.mix_prob,
        switch_prob=mix.switch_prob,
        label_smoothing=mix.label_smoothing,
        num_classes=num_classes,
    )
