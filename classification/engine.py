"""The loop: one epoch of training, one evaluation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from hvt_backbones import InputError
from hvt_backbones.device import select_device

from .data import batches

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def build_accelerator(device: str, amp: str, accumulation: int = 1) -> Accelerator:
    """accelerate's device, precision and processes.

    Raises:
        InputError: the device is not there, or cannot do the precision.
    """
    kind = select_device(device).type
    if kind == "cpu" and amp == "fp16":
        raise InputError("train.amp: fp16 needs an accelerator; use bf16 or no on the CPU.")
    # accelerate keeps the precision of a process's first run; a second one has its own
    AcceleratorState._reset_state()
    try:
        return Accelerator(cpu=kind == "cpu", mixed_precision=amp, gradient_accumulation_steps=accumulation)
    except ValueError as error:
        raise InputError(f"train.amp: {amp} does not work on this device: {error}") from None


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: Scheduler,
    accelerator: Accelerator,
    *,
    epoch: int,
    epochs: int,
    label_smoothing: float,
    mixup: Mixup | None,
    clip_grad: float | None,
    ema: ModelEmaV3 | None,
) -> dict[str, float]:
    """One pass over the loader. Returns the mean loss, the last learning rate, and images per second of all ranks.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    model.train()
    accumulation = accelerator.gradient_accumulation_steps
    steps = len(loader) // accumulation  # a last, incomplete group of batches is left out
    step = epoch * steps
    scheduler.step_update(step)
    total_loss = torch.zeros((), device=accelerator.device)
    images_seen, start = 0, time.perf_counter()
    with tqdm(
        total=steps * accumulation,
        desc=f"epoch {epoch + 1}/{epochs}",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,  # None: only where a person watches
    ) as progress:
        for index, (images, targets) in enumerate(
            islice(batches(loader, accelerator.device), steps * accumulation), start=1
        ):
            if mixup is not None:
                images, targets = mixup(images, targets)
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    logits = model(images)
                # mixup smooths the labels itself
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=0.0 if mixup else label_smoothing)
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip_grad is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                scheduler.step_update(step)
                if ema is not None:
                    ema.update(accelerator.unwrap_model(model), step=step)
            total_loss += loss.detach()
            images_seen += len(images) * accelerator.num_processes
            progress.update()
            if index % CHECK_EVERY == 0 or index == steps * accumulation:
                mean_loss = total_loss.item() / index
                if not math.isfinite(mean_loss):
                    raise DivergedError(
                        f"the loss became {mean_loss} in epoch {epoch + 1}, at or before batch {index}. "
                        "Lower --lr, lengthen schedule.warmup_epochs, or set optimizer.clip_grad."
                    )
                rate = images_seen / (time.perf_counter() - start)
                progress.set_postfix_str(
                    f"loss {mean_loss:.4f}, lr {learning_rate(optimizer):.2e}, {rate:.0f} images/s", refresh=False
                )
    seconds = time.perf_counter() - start
    mean_loss = accelerator.reduce(total_loss, "mean").item() / (steps * accumulation)
    return {"train_loss": mean_loss, "lr": learning_rate(optimizer), "images_per_second": images_seen / seconds}


def learning_rate(optimizer: Optimizer) -> float:
    """The largest of the groups: that of the head, where layers decay."""
    return max(group["lr"] for group in optimizer.param_groups)


@dataclass(frozen=True)
class Evaluation:
    """Sums over a data set; every image counts once."""

    images: int
    correct1: int
    correct5: int
    loss_sum: float

    @property
    def top1(self) -> float:
        """Per cent."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self) -> float:
        """Per cent."""
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Evaluation:
    """Cross-entropy, top-1 and top-5 of `model` (not wrapped for several processes) over all ranks' loaders."""
    training = model.training
    model.eval()
    sums = torch.zeros(4, device=accelerator.device)  # float32 counts exactly up to 2**24 images
    for images, targets in tqdm(
        batches(loader, accelerator.device),
        total=len(loader),
        desc="evaluate",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    ):
        with accelerator.autocast():
            logits = model(images)
        sums += _batch_sums(logits.float(), targets)
    model.train(training)
    images, correct1, correct5, loss = accelerator.reduce(sums, "sum").tolist()
    return Evaluation(round(images), round(correct1), round(correct5), loss)


def _batch_sums(logits: Tensor, targets: Tensor) -> Tensor:
    best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
    return torch.stack(
        [
            torch.tensor(float(len(targets)), device=logits.device),
            best[:, 0].sum().float(),
            best.any(1).sum().float(),
            F.cross_entropy(logits, targets, reduction="sum"),
        ]
    )
