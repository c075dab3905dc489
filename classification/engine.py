"""One training step, one evaluation."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import Batch, Unreadable, batches
from .signals import StoppedError, StopRequest


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a number."""


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


class TrainStep:
    """One optimiser step over `accumulation` batches: forward, backward, clipping, and a look at what came out.

    Args:
        model: as `accelerator.prepare` or `fully_shard` leave it.
        optimizer: accelerate's.
        accelerator: with the number of batches per step.
        label_smoothing: of the cross-entropy; `mixup` smooths by itself.
        mixup: timm's, or None.
        clip_grad: largest global norm, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        *,
        label_smoothing: float = 0.0,
        mixup: Mixup | None = None,
        clip_grad: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.label_smoothing = 0.0 if mixup else label_smoothing
        self.mixup = mixup
        self.clip_grad = clip_grad
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # DeepSpeed's engine clips and steps within `backward`
        self.engine_steps = hasattr(model, "zero_optimization_stage")

    def __call__(self, group: Sequence[Batch], stop: StopRequest | None = None) -> Outcome:
        """
        Args:
            group: `accumulation` batches.
            stop: looked at when the gradients are there.
        """
        accelerator = self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for batch in group:
            images, targets = batch.images, batch.targets
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            with accelerator.accumulate(self.model):
                if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2's counterpart of DDP's no_sync
                    self.model.set_requires_gradient_sync(accelerator.sync_gradients)
                with accelerator.autocast():
                    logits = self.model(images)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
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
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    accelerator: Accelerator,
    *,
    stop: StopRequest | None = None,
    unreadable: Unreadable | None = None,
) -> Evaluation:
    """Cross-entropy, top-1 and top-5 over all ranks' loaders.

    Args:
        model: not wrapped by DDP: the ranks' numbers of batches may differ. One that is sharded gathers its weights
            with every batch, so the ranks that have fewer repeat their last one without counting it.
        stop: looked at before each batch; all processes end where one has got a signal.
        unreadable: counts the pictures that are passed over.

    Raises:
        StoppedError: a signal came to one of the processes.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    sums = torch.zeros(5, device=accelerator.device)  # float32 counts exactly up to 2**24 images
    sharded = hasattr(model, "unshard") or hasattr(model, "zero_optimization_stage")
    for batch in tqdm(
        _padded(loader, accelerator) if sharded else batches(loader, accelerator.device),
        total=len(loader),
        desc="evaluate",
        unit="batch",
        leave=False,
        dynamic_ncols=True,
        disable=None if accelerator.is_main_process else True,
    ):
        if stop is not None and _asked_to_stop(stop, accelerator, agree=sharded):
            sums[4] = 1
            break
        with accelerator.autocast():
            logits = model(batch.images)
        if len(batch.targets):
            sums[:4] += _batch_sums(logits[: len(batch.targets)].float(), batch.targets)
        if unreadable is not None:
            unreadable.add(batch.unreadable)
    for module in training:
        module.training = True
    images, correct1, correct5, loss, stops = accelerator.reduce(sums, "sum").tolist()
    if stops:
        raise StoppedError(stop.number or signal.SIGTERM)
    return Evaluation(round(images), round(correct1), round(correct5), loss)


def _asked_to_stop(stop: StopRequest, accelerator: Accelerator, *, agree: bool) -> bool:
    """Whether a signal has come: to this process, or, where they have to `agree`, to any."""
    if not agree:
        return stop.number > 0
    asked = torch.tensor(float(stop.number > 0), device=accelerator.device)
    torch.distributed.all_reduce(asked)
    return bool(asked)


def _padded(loader: DataLoader, accelerator: Accelerator) -> Iterator[Batch]:
    """This rank's batches, the last one repeated without its targets until the longest rank is through."""
    most = torch.tensor(len(loader), device=accelerator.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    count, batch = 0, None
    for count, batch in enumerate(batches(loader, accelerator.device), start=1):  # noqa: B007
        yield batch
    if batch is None:  # fewer pictures than ranks: this one borrows the first
        batch = loader.collate_fn([loader.dataset[0]])
        batch = batch._replace(images=batch.images.to(accelerator.device), targets=batch.targets.to(accelerator.device))
    for _ in range(int(most) - count):
        yield batch._replace(targets=batch.targets[:0], unreadable=[])


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
