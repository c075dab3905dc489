"""The parts of a run, made from its configuration."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from hvt_backbones import Classifier, InputError, create_classifier

from .checkpoint import model_overrides
from .config import Config
from .data import Pictures


def build_model(config: Config, data: Pictures) -> Classifier:
    """The model of a recipe, for the classes of its pictures."""
    settings = config.model
    try:
        model = create_classifier(
            settings.name,
            num_classes=len(data.class_names),
            pretrained=settings.pretrained,
            class_map=settings.class_map,
            **model_overrides(config),
        )
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.overrides: {settings.overrides} do not build a {settings.name}: {error}") from None
    model.freeze_stages(len(model.backbone.stages) if settings.freeze_backbone else settings.freeze_stages)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    return model


def lr_scale(config: Config, global_batch: int) -> float:
    """The linear rule (arXiv:1706.02677): rates are stated for a batch, and grow with it."""
    stated = config.optimizer.lr_batch_size
    return 1.0 if stated is None else global_batch / stated


def build_optimizer(
    config: Config, model: Classifier, global_batch: int, device: torch.device
) -> torch.optim.Optimizer:
    """timm's optimiser over the model's parameter groups, at the rate of the global batch."""
    settings = config.optimizer
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
            lr=settings.lr * lr_scale(config, global_batch),
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
            **kernel,
        )
    except (TypeError, ImportError) as error:
        raise InputError(f"optimizer.name: {settings.name} cannot be built with these settings: {error}") from None


def build_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, global_batch: int, steps_per_epoch: int
) -> Scheduler:
    """timm's schedule, by steps."""
    settings, scale = config.schedule, lr_scale(config, global_batch)
    # "constant" by its own name came to timm late
    sched = {"linear": "poly", "constant": "step"}.get(settings.name, settings.name)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=config.train.epochs,
        decay_rate=0.1 if settings.name == "poly" else 1.0,  # of "poly" the power
        warmup_epochs=warmup_epochs(config),
        warmup_lr=settings.warmup_lr * scale,
        min_lr=settings.min_lr * scale,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def warmup_epochs(config: Config) -> int:
    """A run shorter than its recipe's warm-up, such as a first try, warms up until its last epoch."""
    return min(config.schedule.warmup_epochs, config.train.epochs - 1)


def build_mixup(config: Config, num_classes: int) -> Mixup | None:
    mix = config.augmentation
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
