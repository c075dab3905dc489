"""How far a run is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .data.pictures import Unreadable


@dataclass(frozen=True)
class Evaluation:
    """Of a data set, every image of which counts once: the mean loss and, of a classifier, how many are right and
    accuracies in per cent.
    """

    images: int
    loss: float
    correct: int | None = None
    top1: float | None = None
    top5: float | None = None

    def columns(self) -> dict[str, float]:
        """Its part of a row of the history."""
        row = {
            "val_loss": self.loss,
            "top1": self.top1,
            "top5": self.top5,
            "val_images": self.images,
            "val_correct": self.correct,
        }
        return {name: value for name, value in row.items() if value is not None}


def score(row: Mapping[str, Any]) -> float:
    """How good an epoch of the history is, the more the better: its top-1, without one its loss, negative."""
    if "top1" in row:
        return row["top1"]
    return -row["val_loss"] if math.isfinite(row["val_loss"]) else -math.inf


def score_text(row: Mapping[str, Any]) -> str:
    """`top-1 98.66 %`, `loss 0.1234`."""
    return f"top-1 {row['top1']:.2f} %" if "top1" in row else f"loss {row['val_loss']:.4f}"


def _epoch() -> dict[str, float]:
    return {"loss": 0.0, "steps": 0, "seconds": 0.0}


@dataclass(kw_only=True)
class Progress:
    """How far a run is, in its own units, and what it has met on the way.

    Attributes:
        epochs: of the whole run.
        steps_per_epoch: optimiser steps.
        global_batch: pictures of a step, of all processes.
        unreadable, unreadable_held_out: pictures for training and for evaluation that were passed over.
        step: optimiser steps that are done.
        history: a row of `log.csv` for each epoch that is done.
        inherited: epochs of the history that another run, of another folder, has trained.
        bad_steps, skipped_steps: without effect, in a row and in all.
        epoch: of the epoch so far: the sum of the losses of the good "steps", and "seconds".
    """

    epochs: int
    steps_per_epoch: int
    global_batch: int
    unreadable: Unreadable
    unreadable_held_out: Unreadable
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    inherited: int = 0
    bad_steps: int = 0
    skipped_steps: int = 0
    epoch: dict[str, float] = field(default_factory=_epoch)

    @property
    def own(self) -> list[dict[str, Any]]:
        """The epochs whose weights are in the run's own folder."""
        return self.history[self.inherited :]

    def speed(self) -> dict[str, float]:
        """Of the epoch so far."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        seconds = self.epoch["seconds"] / steps
        return {"ms_per_step": 1000 * seconds, "images_per_second": self.global_batch / seconds}

    def seconds_left(self, ms_per_step: float) -> float:
        """What the run still needs, evaluation included."""
        steps = self.epochs * self.steps_per_epoch - self.step
        evaluation = self.history[-1]["val_seconds"] if self.history else 0.0
        return steps * ms_per_step / 1000 + (self.epochs - len(self.history)) * evaluation

    def end_epoch(self, result: Evaluation, *, val_seconds: float, lr: float, peak_memory_gib: float) -> bool:
        """Close an epoch with its row of the history; a collective call.

        Returns:
            Whether it is the best so far of those whose weights are in the run's own folder.
        """
        row = {
            "epoch": len(self.history) + 1,
            "step": self.step,
            "train_loss": self.epoch["loss"] / max(self.epoch["steps"], 1),
            "lr": lr,
            **self.speed(),
            "peak_memory_gib": peak_memory_gib,
            **result.columns(),
            "val_seconds": val_seconds,
            "seconds": self.epoch["seconds"] + val_seconds,
            "skipped_steps": self.skipped_steps,
            "unreadable": len(self.unreadable.gather()) + len(self.unreadable_held_out.gather()),
        }
        improved = all(score(row) > score(earlier) for earlier in self.own)
        self.history.append(row)
        self.epoch = _epoch()
        return improved

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; a collective call."""
        return {
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "global_batch": self.global_batch,
            "progress": self.epoch,
            "history": self.history,
            "inherited": self.inherited,
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
            "unreadable": self.unreadable.gather(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where the run of a checkpoint's `state` was."""
        self.history, self.epoch = list(state["history"]), dict(state["progress"])
        self.inherited, self.bad_steps = state["inherited"], state["bad_steps"]
        self.skipped_steps = state["skipped_steps"]
        self.unreadable.names.update(state["unreadable"])
        # with another global batch (which has to be allowed), the same share of the pictures has been seen
        self.step = round(state["step"] * self.steps_per_epoch / state["steps_per_epoch"])
