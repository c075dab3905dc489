"""The figures of `hvt diagnose` at steps of a run, and a warning before it blows up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from hvt_backbones.diagnose import BlockDiagnosis, Observer, eval_mode, gradient_norms

from ..state import Learner
from .log import EventWriter

PICTURES = 16  # of a batch
# Growth of the variance or the largest logit since the first diagnosis that is warned of, and of each further warning.
# Swin on the digits: twentyfold at most in runs that learned; in four that ended with a loss that is no number (rates
# of 1 to 100) a hundredfold 1 to 5 steps before.
FIRST_GROWTH, FURTHER_GROWTH = 100.0, 10.0
# What a norm gives has the variance 1, and logits up to 1 are next to no attention: growth from less is none.
LEAST = 1.0
# of a figure over all blocks -> how it is told
EXTREMES: dict[str, tuple[Callable[..., str], str]] = {
    "variance": (max, "variance up to"),
    "logit": (max, "logits up to"),
    "entropy": (min, "attention entropy from"),
    "gradient": (max, "gradient norms up to"),
}
WATCHED = ("variance", "logit")


class StepDiagnosis:
    """Diagnoses a learner's model at the first step, then every so many, before the step changes it.

    The forward pass of the first pictures of the step's batch is one of its own, in eval mode, which draws no random
    number. The gradients are those of the step, as the optimiser takes them, clipped; there are none where it passes
    over the step. The figures go to TensorBoard, their extremes to the terminal.

    Args:
        every: steps; None for no diagnosis.
    """

    def __init__(self, every: int | None, accelerator: Accelerator, learner: Learner, events: EventWriter) -> None:
        self.every = every
        self.accelerator, self.learner, self.events = accelerator, learner, events
        self.limits: dict[str, float] = {}  # figure -> above which it is warned of

    @contextmanager
    def during(self, step: int, images: Tensor) -> Iterator[None]:
        """Around the step of this number, on `images` (B, C, H, W); a collective call."""
        if self.every is None or (self.limits and step % self.every):
            yield
            return
        backbone = self.learner.model.backbone
        observer = Observer(backbone)
        with eval_mode(self.learner.model), observer.watching(), torch.no_grad(), self.accelerator.autocast():
            self.learner.objective.look(self.learner.model, images[:PICTURES])
        norms: dict[str, float] = {}
        handle = self.learner.raw_optimizer.register_step_pre_hook(lambda *_: norms.update(gradient_norms(backbone)))
        try:
            yield
        finally:
            handle.remove()
        self._tell(step, observer.diagnoses(), norms)

    def _tell(self, step: int, blocks: Sequence[BlockDiagnosis], norms: Mapping[str, float]) -> None:
        figures: dict[str, Mapping[str, float]] = {
            "variance": {block.block: block.variance for block in blocks},
            "logit": {block.block: block.logit for block in blocks if block.logit is not None},
            "entropy": {block.block: block.entropy for block in blocks if block.entropy is not None},
            "gradient": norms,
        }
        parts, beyond = [], []
        for name, values in figures.items():
            if not values:
                continue
            extreme, words = EXTREMES[name]
            block = extreme(values, key=lambda block: math.inf if math.isnan(values[block]) else values[block])
            value, limit = values[block], self.limits.get(name, math.inf)
            parts.append(f"{words} {value:.3g} ({block})")
            if name in WATCHED and (value > limit or not math.isfinite(value)):
                beyond.append(f"{name} {value:.3g} in {block} (limit {limit:.3g})")
            if name in WATCHED and (name not in self.limits or value > limit):
                growth = FURTHER_GROWTH if name in self.limits else FIRST_GROWTH
                self.limits[name] = growth * max(LEAST, value)  # in this order LEAST of NaN, too
        self.accelerator.print(f"step {step}: {', '.join(parts)}", flush=True)
        if beyond:
            self.accelerator.print(
                f"warning: step {step}: {', '.join(beyond)}: the run may blow up; lower optimizer.lr or "
                "optimizer.clip_grad",
                flush=True,
            )
        self.events.add(
            step,
            **{f"{name}__{block}": value for name, values in figures.items() for block, value in values.items()},
        )
