"""Steps whose loss or gradient is no number: left out, counted, and after too many in a row the end of the run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from .parts import data_of, type_name

NAMES_SHOWN = 8
LISTING = "bad_batch.txt"
SOURCES = ("img_path", "filename", "frame_dir", "video_id")  # what a sample says of its file


def keep_sources(cfg: Config) -> None:
    """Let mmaction2's samples say their files, which they do not by default."""
    for dataset in data_of(cfg, "train"):
        for step in dataset.get("pipeline", ()):
            if type_name(step) == "PackActionInputs":
                from mmaction.datasets.transforms import PackActionInputs

                given = step.get("meta_keys") or PackActionInputs().meta_keys
                step["meta_keys"] = tuple(dict.fromkeys([*given, "filename", "frame_dir"]))


class DivergedError(RuntimeError):
    """Too many bad steps in a row. The message is one line."""


class BadStepHook(Hook):
    """Leaves out the steps whose loss (of any process) or gradient is no number.

    With fp16, a gradient that overflows while the loss does not is the business of the loss scaler, until the scale
    is below 1.

    Args:
        limit: bad steps in a row that end the run.

    Raises:
        DivergedError: in every process, at the last of them; it names the files of that step.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._names: list[str] = []
        self._losses: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.optim_wrapper, OptimWrapper):
            # it is the model that calls it, in the middle of its step: no hook of MMEngine's comes between
            runner.optim_wrapper.update_params = partial(self._update, runner, runner.optim_wrapper)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        samples = data_batch.get("data_samples") if isinstance(data_batch, dict) else None
        for sample in samples if isinstance(samples, list | tuple) else ():
            found = getattr(sample, "metainfo", {})
            self._names += [str(found[key]) for key in SOURCES if key in found][:1]

    def _update(
        self,
        runner: Runner,
        wrapper: OptimWrapper,
        loss: Tensor,
        step_kwargs: dict[str, Any] | None = None,
        zero_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """MMEngine's `update_params`, but for steps that are bad."""
        self._losses.append(loss.detach())
        wrapper.backward(wrapper.scale_loss(loss))
        if not wrapper.should_update():  # gradients of several batches make one step
            return
        loss_is_bad = ~torch.stack([one.float() for one in self._losses]).isfinite().all()
        gradients = [p.grad for group in wrapper.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(loss.device)
        verdict = torch.stack([loss_is_bad, ~norm.isfinite()]).float()
        all_reduce(verdict, op="max")
        bad_loss, bad_gradient = (value > 0 for value in verdict.tolist())
        scaler = getattr(wrapper, "loss_scaler", None)
        names, self._names, losses, self._losses = self._names, [], self._losses, []
        if bad_loss or (bad_gradient and (scaler is None or scaler.get_scale() < 1)):
            wrapper.zero_grad(**(zero_kwargs or {}))
            self._count(
                runner,
                names,
                f"loss {float(sum(losses)) / len(losses):g}, gradient norm {float(norm):g}",
                bool(loss_is_bad),
            )
            return
        self.in_a_row = 0
        wrapper.step(**(step_kwargs or {}))
        wrapper.zero_grad(**(zero_kwargs or {}))

    def _count(self, runner: Runner, names: list[str], what: str, own: bool) -> None:
        self.in_a_row += 1
        gathered = all_gather_object((names, what, own))
        guilty = [part for part in gathered if part[2]] or gathered
        what = guilty[0][1]
        suspects = [name for part in guilty for name in part[0]]
        more = f" and {len(suspects) - NAMES_SHOWN} more" if len(suspects) > NAMES_SHOWN else ""
        shown = ", ".join(suspects[:NAMES_SHOWN]) + more or "of unknown files"
        step = runner.iter + 1
        runner.logger.warning(f"step {step}: {what}: step skipped ({self.in_a_row} in a row); its batch: {shown}")
        if self.in_a_row < self.limit:
            return
        listing = Path(runner.work_dir) / LISTING
        if is_main_process():
            listing.write_text("\n".join(suspects) + "\n")
        raise DivergedError(
            f"training diverged at step {step} (epoch {runner.epoch + 1}): {what}, {self.in_a_row} bad steps in a row. "
            f"The last batch: {shown} (listed in {listing}). Lower optim_wrapper.optimizer.lr, set "
            "optim_wrapper.clip_grad, or look at these files."
        )
