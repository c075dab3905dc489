"""What a model learns: to name pictures, or to paint what is hidden of them. Each has a loss and a measure of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor

from hvt_backbones import InputError, SimMIM
from hvt_backbones.simmim import random_mask

from .config import AugmentationConfig, SimmimConfig
from .data.loading import Batch
from .progress import Evaluation

PICTURES_SHOWN = 8
OF_MASKS = 0x5EED  # the picture's own draws begin with its seed itself


class Objective(Protocol):
    """Of a run. The `model` is called as it is wrapped for several processes."""

    def loss(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        """Of a batch for training, a scalar in float32."""

    def measure(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        """What an evaluation sums up, (4,), of those pictures of the batch that have a target: the first ones."""

    def look(self, model: Any, images: Tensor) -> None:
        """A forward pass of pictures alone, for what looks into the model."""

    def evaluation(self, sums: Sequence[float]) -> Evaluation:
        """Of all pictures, from the sum of what `measure` returned."""


class Classification:
    """Cross-entropy of the classes, top-1 and top-5.

    Args:
        augmentation: for training: mixup, cutmix and label smoothing.
        num_classes: of the targets.
    """

    def __init__(self, augmentation: AugmentationConfig | None = None, num_classes: int = 0) -> None:
        self.mixup, self.label_smoothing = None, 0.0
        if augmentation is None:
            return
        if not augmentation.mixes:
            self.label_smoothing = augmentation.label_smoothing
            return
        self.mixup = Mixup(  # which smooths by itself
            augmentation.mixup,
            augmentation.cutmix,
            prob=augmentation.mix_prob,
            switch_prob=augmentation.switch_prob,
            label_smoothing=augmentation.label_smoothing,
            num_classes=num_classes,
        )

    def loss(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        images, targets = batch.images, batch.targets
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with accelerator.autocast():
            logits = model(images)
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)

    def measure(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        """Pictures, their losses, how many are right, how many among the best five."""
        with accelerator.autocast():
            logits = model(batch.images)
        targets = batch.targets
        logits = logits[: len(targets)].float()
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        return torch.stack(
            [
                torch.tensor(float(len(targets)), device=logits.device),
                F.cross_entropy(logits, targets, reduction="sum"),
                best[:, 0].sum().float(),
                best.any(1).sum().float(),
            ]
        )

    def look(self, model: Any, images: Tensor) -> None:
        model(images)

    def evaluation(self, sums: Sequence[float]) -> Evaluation:
        images, loss, correct1, correct5 = sums
        return Evaluation(
            images=round(images),
            loss=loss / images,
            correct=round(correct1),
            top1=100 * correct1 / images,
            top5=100 * correct5 / images,
        )


class Reconstruction:
    """SimMIM (arXiv:2111.09886): the mean absolute error of the pixels that are hidden, of squares drawn at random.

    They follow from the seed of the picture, whatever processes and workers there are: in evaluation always the same.

    Args:
        settings: of the masks.
        model: whose loss it is.
        size: height and width of the pictures.
        held_out: how many pictures an evaluation has.

    Attributes:
        shown: of the last evaluation some pictures of this process, (B, C, H, W), their masks, and what was painted.

    Raises:
        InputError: masks that such pictures cannot have.
    """

    def __init__(self, settings: SimmimConfig, model: SimMIM, size: Sequence[int], held_out: int) -> None:
        self.settings, self.model, self.size, self.held_out = settings, model, tuple(size), held_out
        self.shown: list[Tensor] = []
        self._seen: list[tuple[Tensor, ...]] = []
        try:
            self._masks([0])
        except InputError as error:
            raise InputError(f"simmim.mask_patch_size: {error}.") from None

    def _masks(self, seeds: Sequence[int]) -> Tensor:
        """(B, H / patch, W / patch)."""
        settings, masks = self.settings, []
        for seed in seeds:
            mask = random_mask(
                *self.size,
                ratio=settings.mask_ratio,
                mask_patch_size=settings.mask_patch_size,
                patch_size=self.model.patch_size,
                generator=torch.Generator().manual_seed(seed ^ OF_MASKS),
            )
            masks.append(mask)
        return torch.stack(masks)

    def _paint(self, model: Any, batch: Batch, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        mask = self._masks(batch.seeds.tolist()).to(batch.images.device)
        with accelerator.autocast():
            return model(batch.images, mask), mask

    def loss(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        painted, mask = self._paint(model, batch, accelerator)
        return self.model.loss(batch.images, painted, mask)

    def measure(self, model: Any, batch: Batch, accelerator: Accelerator) -> Tensor:
        """Pictures and their losses."""
        painted, mask = self._paint(model, batch, accelerator)
        sums = torch.zeros(4, device=batch.images.device)
        if (count := len(batch.targets)) > 0:
            images, painted, mask = batch.images[:count], painted[:count].float(), mask[:count]
            # every picture has as many hidden pixels as any other
            sums[:2] = torch.stack([sums.new_tensor(count), count * self.model.loss(images, painted, mask)])
            step = max(self.held_out // PICTURES_SHOWN // accelerator.num_processes, 1) * accelerator.num_processes
            some = [place for place, index in enumerate(batch.indices[:count].tolist()) if index % step == 0]
            self._seen.append((images[some].cpu(), mask[some].cpu(), painted[some].cpu()))
        return sums

    def look(self, model: Any, images: Tensor) -> None:
        model(images, self._masks(range(len(images))).to(images.device))

    def evaluation(self, sums: Sequence[float]) -> Evaluation:
        self.shown = [torch.cat(parts)[:PICTURES_SHOWN] for parts in zip(*self._seen, strict=True)]
        self._seen = []
        return Evaluation(images=round(sums[0]), loss=sums[1] / sums[0])
