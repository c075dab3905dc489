"""Train an image classifier: `python -m classification.train RECIPE [--key value ...]`."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from hvt_backbones import Classifier, InputError, create_classifier
from hvt_backbones.errors import exit_on_input_error

from . import checkpoint
from .command_line import parse_command_line
from .config import Config
from .curves import plot_curves
from .data import SEED_STRIDE, PictureFolder, eval_loader, open_data, train_loader
from .engine import DivergedError, Evaluation, build_accelerator, evaluate, train_epoch


class Trainer:
    """A run: model, data, optimiser and schedule of one configuration, and the epochs that remain.

    Everything that can be wrong with the input is found before the output folder is made, except for pictures that
    turn out to be unreadable; even then nothing is written before the first epoch is complete.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        checkpoint.check_output(config)
        self.folder = Path(config.output.dir)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        resumed = self._find_state()
        self.train_data, self.val_data = open_data(config.data, config.augmentation)
        set_seed(config.train.seed)
        self.model = build_model(config, self.train_data)
        self.description = checkpoint.describe_model(config, self.train_data.class_names)
        if resumed is not None:
            self._check_same_model(resumed)

        self.accelerator = build_accelerator(config.train.device, config.train.amp, config.train.accumulation)
        self._build_loaders()
        self._build_optimizer()
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None  # the row whose weights are model_best
        if resumed is not None:
            self._restore(resumed)

    def _find_state(self) -> dict[str, Any] | None:
        resume = self.config.output.resume
        if resume is None:
            return None
        path = self.folder / checkpoint.STATE if resume == "auto" else Path(resume)
        if path.is_file():
            return checkpoint.load_state(path)
        if resume != "auto":
            raise InputError(f"output.resume: {path} does not exist; give a {checkpoint.STATE}, or auto.")
        if held := checkpoint.held_run(self.folder):
            raise InputError(
                f"output.resume: {self.folder} holds {held[0]} but no {checkpoint.STATE}; --overwrite starts anew."
            )
        return None

    def _check_same_model(self, state: Mapping[str, Any]) -> None:
        for key in ("hvt.model", "hvt.overrides", "hvt.class_names"):
            if state["description"][key] != self.description[key]:
                raise InputError(
                    f"output.resume: the checkpoint is of another model: {key.removeprefix('hvt.')} "
                    f"{state['description'][key]} there, {self.description[key]} here."
                )

    def _build_loaders(self) -> None:
        config, accelerator = self.config, self.accelerator
        ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        pin = accelerator.device.type != "cpu"
        self.train_loader = train_loader(self.train_data, config.data, seed=config.train.seed, pin=pin, **ranks)
        self.val_loader = eval_loader(self.val_data, config.data.batch_size, config.data.workers, pin=pin, **ranks)
        self.steps_per_epoch = len(self.train_loader) // config.train.accumulation
        self.global_batch = config.data.batch_size * config.train.accumulation * accelerator.num_processes
        if self.steps_per_epoch == 0:
            raise InputError(
                f"data.batch_size: {len(self.train_data)} training pictures do not fill one batch of "
                f"{self.global_batch} (batch_size x accumulation x processes); lower it."
            )

    def _build_optimizer(self) -> None:
        config, accelerator = self.config, self.accelerator
        optimizer, schedule = config.optimizer, config.schedule
        scale = 1.0 if optimizer.lr_batch_size is None else self.global_batch / optimizer.lr_batch_size
        self.peak_lr = optimizer.lr * scale
        # a run shorter than the recipe's warm-up, such as a first try, warms up until its last epoch
        self.warmup_epochs = min(schedule.warmup_epochs, config.train.epochs - 1)
        groups = self.model.param_groups(weight_decay=optimizer.weight_decay, layer_decay=optimizer.layer_decay)
        try:
            built = create_optimizer_v2(
                groups,
                opt=optimizer.name,
                lr=self.peak_lr,
                weight_decay=optimizer.weight_decay,
                betas=optimizer.betas,
                eps=optimizer.eps,
            )
        except (TypeError, ImportError) as error:
            raise InputError(f"optimizer.name: {optimizer.name} cannot be built with these settings: {error}") from None
        self.scheduler, _ = create_scheduler_v2(
            built,
            sched=schedule.name,
            num_epochs=config.train.epochs,
            warmup_epochs=self.warmup_epochs,
            warmup_lr=schedule.warmup_lr * scale,
            min_lr=schedule.min_lr * scale,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        self.model.to(accelerator.device)
        self.ema = None
        if config.train.ema_decay > 0:
            self.ema = ModelEmaV3(self.model, decay=config.train.ema_decay, use_warmup=True)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, built)
        mix = config.augmentation
        self.mixup = None
        if mix.mixes:
            self.mixup = Mixup(
                mix.mixup,
                mix.cutmix,
                prob=mix.mix_prob,
                switch_prob=mix.switch_prob,
                label_smoothing=mix.label_smoothing,
                num_classes=len(self.train_data.class_names),
            )

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model whose weights are evaluated and saved: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def _state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "description": self.description,
            "epoch": len(self.history),
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"] or state["model"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.history = list(state["history"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"output.resume: the checkpoint does not fit these settings: {error}") from None
        if self.history and (self.folder / checkpoint.BEST_WEIGHTS).exists():
            self.best = max(self.history, key=lambda row: row["top1"])

    def run(self) -> dict[str, Any]:
        """Train the epochs that remain; returns the contents of `metrics.json`."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            with checkpoint.output_folder(self.folder):
                return self._run()
        return self._run()

    def _run(self) -> dict[str, Any]:
        config, accelerator = self.config, self.accelerator
        self._announce()
        start = time.perf_counter()
        for epoch in range(len(self.history), config.train.epochs):
            # seeded per epoch: a resumed run augments and drops as the uninterrupted one
            set_seed((config.train.seed + SEED_STRIDE * (epoch + 1) + accelerator.process_index) % 2**32)
            self.train_loader.sampler.set_epoch(epoch)
            epoch_start = time.perf_counter()
            trained = train_epoch(
                self.wrapped,
                self.train_loader,
                self.optimizer,
                self.scheduler,
                accelerator,
                epoch=epoch,
                epochs=config.train.epochs,
                label_smoothing=config.augmentation.label_smoothing,
                mixup=self.mixup,
                clip_grad=config.optimizer.clip_grad,
                ema=self.ema,
            )
            result = evaluate(self.evaluated, self.val_loader, accelerator)
            self._record(epoch, trained, result, time.perf_counter() - epoch_start)
        return self._finish(time.perf_counter() - start)

    def _announce(self) -> None:
        config, accelerator = self.config, self.accelerator
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        stated = config.optimizer.lr_batch_size
        scaling = "" if stated is None else f" ({config.optimizer.lr:g} for {stated}, scaled linearly)"
        accelerator.print(
            f"{self.description['hvt.model']}, {millions:.2f} M parameters, on {accelerator.num_processes} x "
            f"{accelerator.device.type}, precision {accelerator.mixed_precision}\n"
            f"{len(self.train_data)} training and {len(self.val_data)} held-out pictures of "
            f"{len(self.train_data.class_names)} classes, {config.data.input_size[1]}x{config.data.input_size[2]}\n"
            f"global batch {self.global_batch}, {self.steps_per_epoch} steps per epoch, learning rate "
            f"{self.peak_lr:g}{scaling}, {self.warmup_epochs} epochs of warm-up"
        )
        if self.history:
            accelerator.print(f"resumed after epoch {len(self.history)}")

    def _record(self, epoch: int, trained: Mapping[str, float], result: Evaluation, seconds: float) -> None:
        row = {
            "epoch": epoch + 1,
            **trained,
            "val_loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "val_images": result.images,
            "val_correct": result.correct1,
            "seconds": seconds,
        }
        self.history.append(row)
        improved = self.best is None or result.top1 > self.best["top1"]
        if improved:
            self.best = row
        width = len(str(self.config.train.epochs))
        self.accelerator.print(
            f"epoch {epoch + 1:{width}}/{self.config.train.epochs}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  "
            f"held-out loss {result.loss:.4f}  top-1 {result.top1:.2f}  top-5 {result.top5:.2f}  "
            f"{row['images_per_second']:.0f} images/s  {seconds:.1f} s{'  *' if improved else ''}"
        )
        if self.accelerator.is_main_process:
            self._save(improved, row)
            if epoch == 0:  # --overwrite: what the old run wrote at its end would pass for this run's
                for name in (checkpoint.METRICS, checkpoint.CURVES):
                    (self.folder / name).unlink(missing_ok=True)

    def _save(self, improved: bool, row: Mapping[str, float]) -> None:
        described = {**self.description, "hvt.epoch": str(row["epoch"]), "hvt.top1": f"{row['top1']:.4f}"}
        weights = self.evaluated.state_dict()
        checkpoint.save_state(self.folder, self._state())  # first: whatever fails after it, the run can be resumed
        if improved:
            checkpoint.save_weights(self.folder, checkpoint.BEST_WEIGHTS, weights, described)
        checkpoint.save_weights(self.folder, checkpoint.LAST_WEIGHTS, weights, described)
        checkpoint.write_atomically(self.folder / checkpoint.LOG, self._write_log)
        settings = yaml.safe_dump(self.config.as_dict(), sort_keys=False)
        checkpoint.write_atomically(self.folder / checkpoint.CONFIG, lambda path: path.write_text(settings))

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.history[0]))
            writer.writeheader()
            writer.writerows(self.history)

    def _finish(self, seconds: float) -> dict[str, Any]:
        best = self.best or max(self.history, key=lambda row: row["top1"])
        metrics = {
            "model": self.description["hvt.model"],
            "epochs": len(self.history),
            "best": {key: best[key] for key in ("epoch", "top1", "top5", "val_loss", "val_correct", "val_images")},
            "last": {key: self.history[-1][key] for key in ("epoch", "top1", "top5", "val_loss")},
            "train_seconds": sum(row["seconds"] for row in self.history),
        }
        if self.accelerator.is_main_process:
            text = json.dumps(metrics, indent=2) + "\n"
            checkpoint.write_atomically(self.folder / checkpoint.METRICS, lambda path: path.write_text(text))
            title = f"{metrics['model']}, {len(self.train_data.class_names)} classes, seed {self.config.train.seed}"
            plot_curves(self.history, self.folder / checkpoint.CURVES, title=title)
        self.accelerator.print(
            f"best top-1 {best['top1']:.2f} % in epoch {best['epoch']}; {seconds:.0f} s; results are in {self.folder}"
        )
        return metrics


def build_model(config: Config, data: PictureFolder) -> Classifier:
    """The model of a recipe, for the classes of its pictures."""
    settings = config.model
    try:
        model = create_classifier(
            settings.name,
            num_classes=len(data.class_names),
            pretrained=settings.pretrained,
            **checkpoint.model_overrides(config),
        )
    except (TypeError, ValueError, AssertionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"model.overrides: {settings.overrides} do not build a {settings.name}: {error}") from None
    model.freeze_stages(settings.freeze_stages)
    model.set_grad_checkpointing(settings.grad_checkpointing)
    return model


def train(config: Config) -> dict[str, Any]:
    """Train as `config` says; returns the contents of `metrics.json`."""
    trainer = Trainer(config)
    try:
        return trainer.run()
    finally:
        trainer.accelerator.end_training()


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    try:
        train(parse_command_line(argv))
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
