"""What a run says while it goes, and what it leaves beside its checkpoints."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Mapping
from typing import Any

import yaml
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from hvt_backbones.atomic import whole_file
from hvt_backbones.model_file import entry, epoch_metadata
from hvt_backbones.reconstruct import write_sheet
from hvt_backbones.weights.files import save_state_dict

from .. import distributed
from ..checkpoint import files
from ..config import Config
from ..data.loading import preprocessing
from ..data.pictures import Pictures
from ..objective import Reconstruction
from ..progress import Progress, score, score_text
from ..state import Learner, Outcome, lr_scale, warmup_epochs
from .curves import plot_curves
from .diagnosis import StepDiagnosis
from .log import EventWriter, duration, listed, peak_memory
from .page import write_report


class Journal:
    """Tells of a run on the terminal and in TensorBoard, and writes the files of its epochs and of its end.

    Args:
        config: of the run.
        accelerator: accelerate's.
        learner, progress: what is told of.
        description: of the model, as its weights carry it.
        train_data, val_data: for training and for evaluation.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, learner: Learner, progress: Progress, *,
        description: Mapping[str, str], train_data: Pictures, val_data: Pictures,
    ) -> None:  # fmt: skip
        self.config, self.accelerator = config, accelerator
        self.learner, self.progress = learner, progress
        self.description = description
        self.train_data, self.val_data = train_data, val_data
        self.folder = files.run_folder(config.output)
        wanted = accelerator.is_main_process and config.output.tensorboard
        self.events = EventWriter(self.folder, wanted=wanted, step=progress.step)
        self.diagnosis = StepDiagnosis(config.output.diagnose_steps, accelerator, learner, self.events)

    def announce(self) -> None:
        """What is about to be trained, and from where."""
        config, accelerator, progress = self.config, self.accelerator, self.progress
        millions = sum(parameter.numel() for parameter in self.learner.model.parameters()) / 1e6
        stated = config.optimizer.lr_batch_size
        peak = config.optimizer.lr * lr_scale(config.optimizer, progress.global_batch)
        scaling = "" if stated is None else f" ({config.optimizer.lr:g} for {stated}, scaled linearly)"
        shared = f", {config.parallel.mode}" if accelerator.num_processes > 1 else ""
        accelerator.print(
            f"{entry(self.description, 'model')}, {millions:.2f} M parameters, on {accelerator.num_processes} x "
            f"{accelerator.device.type}{shared}, precision {distributed.precision(accelerator)}\n"
            f"{len(self.train_data)} training and {len(self.val_data)} held-out pictures of "
            f"{len(self.train_data.class_names)} classes, {config.data.input_size[1]}x{config.data.input_size[2]}\n"
            f"global batch {progress.global_batch}, {progress.steps_per_epoch} steps per epoch, learning rate "
            f"{peak:g}{scaling}, {warmup_epochs(config.schedule, config.train.epochs)} epochs of warm-up"
        )
        for pictures, what in ((self.train_data, "training"), (self.val_data, "held-out")):
            if absent := pictures.classes_without_pictures():
                accelerator.print(
                    f"{len(absent)} of {len(pictures.class_names)} classes have no {what} pictures: {listed(absent)}"
                )
        if config.data.on_error == "skip":
            accelerator.print(
                f"data.on_error = skip: up to {self.train_data.max_unreadable} training and "
                f"{self.val_data.max_unreadable} held-out pictures may be unreadable (data.max_errors = "
                f"{config.data.max_errors:g}, at least one)"
            )
        if progress.step:
            epoch, done = divmod(progress.step, progress.steps_per_epoch)
            within = f", {done} steps into epoch {epoch + 1}" if done else ""
            accelerator.print(f"resumed after step {progress.step}{within}")

    def show_step(self, bar: tqdm, outcome: Outcome) -> None:
        """Move the bar on; every `output.log_steps` steps, and at the end of an epoch, with the figures of the step."""
        bar.update()
        progress = self.progress
        if progress.step % self.config.output.log_steps and progress.step % progress.steps_per_epoch:
            return
        speed = progress.speed()
        lr = self.learner.learning_rate
        best = max(progress.history, key=score, default=None)
        line = (
            f"loss {outcome.loss:.4f}, lr {lr:.2e}, {speed['images_per_second']:.0f} images/s, "
            f"{speed['ms_per_step']:.0f} ms/step, {peak_memory(self.accelerator.device):.1f} GiB, "
            f"{'' if best is None else f'best {score_text(best)}, '}ETA {self._remaining(speed['ms_per_step'])}"
        )
        bar.set_postfix_str(line)
        if bar.disable and progress.step % progress.steps_per_epoch:
            # a log file; the epoch's own line follows its last step
            self.accelerator.print(f"step {progress.step}: {line}", flush=True)
        self.events.add(
            progress.step, train__loss=outcome.loss, train__lr=lr, train__grad_norm=outcome.grad_norm, **{
                f"speed__{name}": value for name, value in speed.items()
            }
        )  # fmt: skip

    def end_epoch(self, *, improved: bool) -> None:
        """The last row of the history: its weights, its line; a collective call.

        Args:
            improved: whether it is the best of this run.
        """
        progress = self.progress
        row = progress.history[-1]
        weights = self.learner.weights(averaged=True)
        if self.accelerator.is_main_process:
            self._write(weights, row, improved)
        width = len(str(progress.epochs))
        accuracy = f"top-1 {row['top1']:.2f}  top-5 {row['top5']:.2f}  " if "top1" in row else ""
        passed = f"  {row['unreadable']} unreadable pictures" if row["unreadable"] else ""
        self.accelerator.print(
            f"epoch {row['epoch']:{width}}/{progress.epochs}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  "
            f"held-out loss {row['val_loss']:.4f}  {accuracy}"
            f"{row['images_per_second']:.0f} images/s  {row['ms_per_step']:.0f} ms/step  "
            f"{row['peak_memory_gib']:.1f} GiB  ETA {self._remaining(row['ms_per_step'])}{passed}"
            f"{'  *' if improved else ''}",
            flush=True,
        )
        accuracies = {f"val__{name}": row[name] for name in ("top1", "top5") if name in row}
        self.events.add(progress.step, train__epoch_loss=row["train_loss"], val__loss=row["val_loss"], **accuracies)

    def _write(self, weights: Mapping[str, Tensor], row: Mapping[str, Any], improved: bool) -> None:
        """What an epoch leaves beside its checkpoint."""
        figures = {name: row[name] for name in ("top1", "val_loss") if name in row}
        described = {**self.description, **epoch_metadata(row["epoch"], **figures)}
        if improved:
            save_state_dict(weights, self.folder / files.BEST_WEIGHTS, described)
        save_state_dict(weights, self.folder / files.LAST_WEIGHTS, described)
        with whole_file(self.folder / files.LOG) as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row), restval="")
            writer.writeheader()
            writer.writerows(self.progress.history)
        described_run = self.config.as_dict()
        # a recipe that replaces a run without being asked would be a trap
        described_run["output"] |= {"resume": None, "overwrite": False, "allow_changes": False}
        settings = yaml.safe_dump(described_run, sort_keys=False)
        with whole_file(self.folder / files.CONFIG) as path:
            path.write_text(settings)
        if row["epoch"] == 1:  # --overwrite: what the old run wrote at its end would pass for this run's
            for name in (files.METRICS, files.CURVES, files.REPORT):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / files.RECONSTRUCTIONS, ignore_errors=True)
        self._draw(row["epoch"])

    def _draw(self, epoch: int) -> None:
        """What the model paints of some held-out pictures, where that is its task and the epoch has its turn."""
        objective, every = self.learner.objective, self.config.simmim.picture_epochs
        if not isinstance(objective, Reconstruction) or not objective.shown or not every:
            return
        if epoch % every == 0 or epoch in (1, self.progress.epochs):
            width = len(str(self.progress.epochs))
            path = self.folder / files.RECONSTRUCTIONS / f"epoch_{epoch:0{width}d}.png"
            pictures, mask, painted = objective.shown
            write_sheet(path, objective.model, pictures, mask, painted, preprocessing(self.config.data))

    def finish(self, seconds: float) -> dict[str, Any]:
        """Write `metrics.json`, curves and report of a run that took so many `seconds` now; returns the metrics."""
        history, progress = self.progress.history, self.progress
        best = max(progress.own or history, key=score)
        metrics = {
            "model": entry(self.description, "model"),
            "epochs": len(history),
            "steps": progress.step,
            "best": _finite(best, "epoch", "top1", "top5", "val_loss", "val_correct", "val_images"),
            "last": _finite(history[-1], "epoch", "top1", "top5", "val_loss"),
            "train_seconds": sum(row["seconds"] for row in history),
            "images_per_second": history[-1]["images_per_second"],
            "ms_per_step": history[-1]["ms_per_step"],
            "skipped_steps": progress.skipped_steps,
            "unreadable": history[-1]["unreadable"],
        }
        if self.accelerator.is_main_process:
            text = json.dumps(metrics, indent=2) + "\n"
            with whole_file(self.folder / files.METRICS) as path:
                path.write_text(text)
            title = f"{metrics['model']}, {len(self.train_data.class_names)} classes, seed {self.config.train.seed}"
            plot_curves(history, self.folder / files.CURVES, title=title)
            write_report(
                self.folder,
                metrics=metrics,
                history=history,
                config=self.config,
                title=title,
                unreadable=sorted(progress.unreadable.names | progress.unreadable_held_out.names),
            )
        self.accelerator.print(
            f"best {score_text(best)} in epoch {best['epoch']}; {seconds:.0f} s; results are in {self.folder}"
        )
        return metrics

    def close(self) -> None:
        self.events.close()

    def _remaining(self, ms_per_step: float) -> str:
        return duration(self.progress.seconds_left(ms_per_step))


def _finite(row: Mapping[str, float], *names: str) -> dict[str, float | None]:
    """Those of the columns that the row has; JSON has no NaN."""
    return {name: row[name] if math.isfinite(row[name]) else None for name in names if name in row}
