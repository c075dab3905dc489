"""A run: model, data, optimiser and schedule of one configuration, and the steps that remain."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from timm.utils import ModelEmaV3
from tqdm import tqdm

from hvt_backbones import InputError

from . import checkpoint, parallel
from .build import build_mixup, build_model, build_optimizer, build_scheduler, lr_scale, warmup_epochs
from .config import Config
from .curves import plot_curves
from .data import Batch, Unreadable, batches, eval_loader, open_data, train_loader
from .engine import DivergedError, Evaluation, Outcome, TrainStep, evaluate
from .log import EventWriter, duration, peak_memory, write_log
from .report import write_report
from .resume import check_same_run, choose_checkpoint, revision
from .stop import StoppedError, StopRequest

SEED_STRIDE = 100_003  # between the seeds of two runs; ranks count upward from each
NAMES_SHOWN = 4
# Of an optimiser's groups: those of this run, not of its checkpoint, which may have others or another device's kernels.
OPTIMIZER_SETTINGS = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "foreach", "fused"}


class Trainer:
    """Everything that a configuration asks for, built; `run` trains.

    Everything that can be wrong with the input is found before the output folder is made, except for pictures that
    turn out to be unreadable.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        checkpoint.check_output(config)
        self.folder = Path(config.output.dir)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.train_data, self.val_data = open_data(config.data, config.augmentation)
        set_seed(config.train.seed)
        self.model = build_model(config, self.train_data)
        self.description = checkpoint.describe_model(config, self.train_data.class_names)
        self.accelerator = parallel.build_accelerator(
            config.train.device,
            config.train.amp,
            accumulation=config.train.accumulation,
            mode=config.parallel.mode,
            timeout=config.parallel.timeout,
            batch_size=config.data.batch_size,
            clip_grad=config.optimizer.clip_grad,
        )
        self._build_loaders()
        self._build_optimizer()
        self.stop = StopRequest()
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.inherited = 0  # epochs of the history that another run, of another folder, has trained
        self.bad_steps = 0  # in a row
        self.skipped_steps = 0  # in all
        self.progress = {"loss": 0.0, "steps": 0, "seconds": 0.0}  # of the epoch so far
        set_seed(config.train.seed + SEED_STRIDE * (1 + self.accelerator.process_index))
        self.checkpoint = self._find_checkpoint()
        if self.checkpoint is not None:
            self._restore(self.checkpoint)

    # ---- building

    def _build_loaders(self) -> None:
        config, accelerator = self.config, self.accelerator
        ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        pin = accelerator.device.type != "cpu"
        self.global_batch = config.data.batch_size * config.train.accumulation * accelerator.num_processes
        self.train_loader = train_loader(
            self.train_data,
            config.data,
            seed=config.train.seed,
            accumulation=config.train.accumulation,
            pin=pin,
            **ranks,
        )
        self.val_loader = eval_loader(self.val_data, config.data.batch_size, config.data.workers, pin=pin, **ranks)
        self.steps_per_epoch = len(self.train_loader) // config.train.accumulation
        if self.steps_per_epoch == 0:
            raise InputError(
                f"data.batch_size: {len(self.train_data)} training pictures do not fill one batch of "
                f"{self.global_batch} (batch_size x accumulation x processes); lower it."
            )
        self.unreadable, self.unreadable_held_out = Unreadable(self.train_data), Unreadable(self.val_data)

    def _build_optimizer(self) -> None:
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        self.model.to(device)
        self.ema = None
        if config.train.ema_decay > 0:
            self.ema = ModelEmaV3(self.model, decay=config.train.ema_decay, use_warmup=True)
        sharded = config.parallel.mode == "fsdp2" and accelerator.num_processes > 1
        if config.train.compile:
            # all blocks share one code, compiled anew for each width, shift and drop rate: PyTorch gives up after 8
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
            for stage in self.model.backbone.stages:
                for block in stage.blocks:
                    block.compile()
        if sharded:
            parallel.shard(self.model, device)
            if self.ema is not None:
                parallel.shard(self.ema.module, device)
        self.raw_optimizer = build_optimizer(config, self.model, self.global_batch, device)
        self.scheduler = build_scheduler(config, self.raw_optimizer, self.global_batch, self.steps_per_epoch)
        if sharded:
            self.wrapped, self.optimizer = self.model, accelerator.prepare(self.raw_optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(self.model, self.raw_optimizer)
        self.train_step = TrainStep(
            self.wrapped,
            self.optimizer,
            accelerator,
            label_smoothing=config.augmentation.label_smoothing,
            mixup=build_mixup(config, len(self.train_data.class_names)),
            clip_grad=config.optimizer.clip_grad,
        )

    @property
    def evaluated(self) -> torch.nn.Module:
        """The model whose weights are evaluated and saved: the average where there is one."""
        if self.ema is not None:
            return self.ema.module
        return self.wrapped if self.train_step.engine_steps else self.model

    @property
    def precision(self) -> str:
        return parallel.precision(self.accelerator)

    # ---- checkpoints

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, chosen by the first process for all."""
        resume = self.config.output.resume
        if resume is None or self.config.train.benchmark_steps:
            return None
        return self._on_main(lambda: choose_checkpoint(self.folder, resume))

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on the first process, for all; and so with an `InputError` that it raises."""
        answer: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                answer = [(action(), None)]
            except InputError as error:
                answer = [(None, str(error))]
        broadcast_object_list(answer)
        result, problem = answer[0]
        if problem:
            raise InputError(problem)
        return result

    def _state(self) -> dict[str, Any]:
        """What all processes share; a collective call."""
        scaler = self.accelerator.scaler
        engine = self.train_step.engine_steps
        return {
            "description": self.description,
            "config": self.config.as_dict(),
            "revision": revision(),
            "torch": str(torch.__version__),  # its own type is not a plain value
            "processes": self.accelerator.num_processes,
            "global_batch": self.global_batch,
            "steps_per_epoch": self.steps_per_epoch,
            "step": self.step,
            "progress": self.progress,
            "history": self.history,
            "inherited": self.inherited,
            "pictures": len(self.train_data),
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
            "unreadable": self._count_unreadable(self.unreadable),
            "model": self._weights(self.model),
            "ema": None if self.ema is None else self._weights(self.ema.module),
            "optimizer": None if engine else parallel.whole_optimizer_state(self.model, self.raw_optimizer),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        if self.config.parallel.mode == "zero3":
            return self.accelerator.get_state_dict(self.wrapped)
        return parallel.whole_model_state(self.model if model is self.wrapped else model)

    def _count_unreadable(self, unreadable: Unreadable) -> list[str]:
        """The names that any process has passed over; a collective call."""
        unreadable.add(gather_object(sorted(unreadable.names)))
        return sorted(unreadable.names)

    def save(self) -> None:
        """Write a checkpoint of this step, on all processes; a run that it replaces goes only now.

        Raises:
            InputError: it cannot be written; the checkpoints before it are as they were.
        """
        accelerator, staging = self.accelerator, checkpoint.staging_folder(self.folder, self.step)
        if checkpoint.step_folder(self.folder, self.step) == self.checkpoint:
            return
        state = self._state()
        problem = None
        if accelerator.is_main_process:
            problem = _attempt(lambda: staging.mkdir(parents=True))
        accelerator.wait_for_everyone()
        if problem is None and not staging.is_dir():
            problem = "not every process sees the folder, which all nodes must share"
        if problem is None:
            rank = f"rank_{accelerator.process_index:05d}.pt"
            problem = _attempt(lambda: parallel.save_generators(staging / rank, accelerator.device))
            if self.train_step.engine_steps:
                self.wrapped.save_checkpoint(str(staging), tag="deepspeed")
            if accelerator.is_main_process and problem is None:
                problem = _attempt(lambda: torch.save(state, staging / checkpoint.STATE))
        problems = [found for found in gather_object([problem]) if found]
        if accelerator.is_main_process and not problems:
            replaces = self.checkpoint is None and self.config.output.overwrite
            seal = checkpoint.seal_checkpoint
            problem = _attempt(lambda: seal(staging, self.folder, self.step, replace_run=replaces))
            problems = [problem] if problem else []
        problems = broadcast_object_list([problems])[0]
        if problems:
            if accelerator.is_main_process:
                checkpoint.remove_leftovers(self.folder)
            kept = f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
            raise InputError(
                f"output.dir: the checkpoint of step {self.step} was not written to {self.folder} ({problems[0]}); "
                f"{kept}. Make room or give another --output-dir."
            )
        self.checkpoint = checkpoint.step_folder(self.folder, self.step)
        if accelerator.is_main_process:
            output = self.config.output
            checkpoint.prune(self.folder, self._own(), keep_last=output.keep_last, keep_best=output.keep_best)

    def _own(self) -> list[dict[str, float]]:
        """The epochs whose weights are in this folder."""
        return self.history[self.inherited :]

    def _restore(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        differences = check_same_run(
            state, self.description, self.config, global_batch=self.global_batch, pictures=len(self.train_data)
        )
        for difference in differences:
            self.accelerator.print(f"changed: {difference}")
        accelerator = self.accelerator
        parallel.check_shards(state, self.config.parallel.mode, accelerator.num_processes)
        own = [
            {key: group[key] for key in OPTIMIZER_SETTINGS & group.keys()} for group in self.raw_optimizer.param_groups
        ]
        try:
            if self.train_step.engine_steps:
                self.wrapped.load_checkpoint(str(path), tag="deepspeed")
            else:
                # before the weights: PyTorch makes a step, at a rate of 0, to have a state that it can fill
                parallel.load_whole_optimizer_state(self.model, self.raw_optimizer, state["optimizer"])
                parallel.load_whole_model_state(self.model, state["model"])
            if self.ema is not None:
                parallel.load_whole_model_state(self.ema.module, state["ema"] or state["model"])
            for group, settings in zip(self.raw_optimizer.param_groups, own, strict=True):
                group.update(settings)
            if not differences:  # else it would bring the old rates and epochs back
                self.scheduler.load_state_dict(state["scheduler"])
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise InputError(f"output.resume: the checkpoint does not fit these settings: {error}") from None
        self.history, self.progress = list(state["history"]), dict(state["progress"])
        self.inherited, self.bad_steps = state["inherited"], state["bad_steps"]
        self.skipped_steps = state["skipped_steps"]
        self.unreadable.names.update(state["unreadable"])
        # with another global batch (which has to be allowed), the same share of the pictures has been seen
        self.step = round(state["step"] * self.steps_per_epoch / state["steps_per_epoch"])
        generators = path / f"rank_{accelerator.process_index:05d}.pt"
        if generators.is_file() and state["processes"] == accelerator.num_processes:
            parallel.load_generators(generators, accelerator.device)
        if path.parent.parent.resolve() != self.folder.resolve():
            # another run's: this one has saved nothing yet
            self.checkpoint, self.inherited = None, len(self.history)

    # ---- running

    def run(self) -> dict[str, Any]:
        """Train the steps that remain; returns the contents of `metrics.json`.

        Raises:
            StoppedError: SIGTERM or SIGINT came; the step was finished and saved.
            DivergedError: `train.max_bad_steps` steps in a row had a loss or gradient that is no number.
            InputError: a picture that cannot be read, or a file that cannot be written.
        """
        main = self.accelerator.is_main_process
        with ExitStack() as stack, self.stop:
            self._on_main(lambda: str(stack.enter_context(checkpoint.output_folder(self.folder))))
            if not all(gather_object([(self.folder / checkpoint.LOCK).is_file()])):  # not after an epoch
                raise InputError(
                    f"output.dir: not every process sees {self.folder}; give an --output-dir that all nodes share."
                )
            if main:
                checkpoint.remove_leftovers(self.folder)
            self.events = EventWriter(self.folder, wanted=main and self.config.output.tensorboard, step=self.step)
            try:
                with parallel.contact(
                    lambda: f"at step {self.step}; the last checkpoint is {self.checkpoint or 'none'}"
                ):
                    return self._run()
            finally:
                self.events.close()

    def _run(self) -> dict[str, Any]:
        self._announce()
        start = time.perf_counter()
        for epoch in range(len(self.history), self.config.train.epochs):
            self._train_epoch(epoch)
            self.save()
            begin = time.perf_counter()
            result = evaluate(
                self.evaluated,
                self.val_loader,
                self.accelerator,
                stop=self.stop,
                unreadable=self.unreadable_held_out,
            )
            self._record(epoch, result, time.perf_counter() - begin)
        return self._finish(time.perf_counter() - start)

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch that remain, with checkpoints on the way."""
        config, accelerator = self.config, self.accelerator
        done = self.step - epoch * self.steps_per_epoch
        accumulation = config.train.accumulation
        self.train_loader.batch_sampler.set_position(epoch, done * accumulation)
        self.wrapped.train()
        self.scheduler.step_update(self.step)
        groups = _grouped(batches(self.train_loader, accelerator.device), accumulation)
        with tqdm(
            total=self.steps_per_epoch,
            initial=done,
            desc=f"epoch {epoch + 1}/{config.train.epochs}",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=None if accelerator.is_main_process else True,  # None: only where a person watches
        ) as bar:
            begin = time.perf_counter()
            for group in islice(groups, self.steps_per_epoch - done):
                for batch in group:
                    self.unreadable.add(batch.unreadable)
                outcome = self.train_step(group, self.stop)
                self.step += 1
                self.scheduler.step_update(self.step)
                if outcome.applied and self.ema is not None:
                    self.ema.update(self.model, step=self.step)
                now = time.perf_counter()
                self._count(outcome, group, now - begin)
                begin = now
                self._show(bar, outcome)
                if outcome.stop:
                    self.save()
                    raise StoppedError(self.stop.number or signal.SIGTERM)
                if config.output.save_steps and self.step % config.output.save_steps == 0:
                    self.save()
                    begin = time.perf_counter()

    def _count(self, outcome: Outcome, group: Sequence[Batch], seconds: float) -> None:
        """Sum up a step, and end the run after too many bad ones."""
        self.progress["seconds"] += seconds
        if outcome.applied:
            self.bad_steps = 0
            self.progress["loss"] += outcome.loss
            self.progress["steps"] += 1
            return
        self.skipped_steps += 1
        scaler = self.accelerator.scaler
        if outcome.overflow and scaler.get_scale() >= 1.0:
            self.accelerator.print(f"step {self.step}: fp16 overflow, step skipped, loss scale {scaler.get_scale():g}")
            return
        self.bad_steps += 1
        what = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        self.accelerator.print(f"step {self.step}: {what}: step skipped ({self.bad_steps} in a row)")
        if self.bad_steps < self.config.train.max_bad_steps:
            return
        names = [self.train_data.filename(int(index)) for batch in group for index in batch.indices]
        suspects = gather_object(names if outcome.local_loss_is_bad else [])
        suspects = suspects or gather_object(names)
        if self.accelerator.is_main_process:
            text = "\n".join(suspects) + "\n"
            checkpoint.write_atomically(self.folder / checkpoint.BAD_BATCH, lambda path: path.write_text(text))
        more = f" and {len(suspects) - NAMES_SHOWN} more" if len(suspects) > NAMES_SHOWN else ""
        raise DivergedError(
            f"training diverged at step {self.step} (epoch {(self.step - 1) // self.steps_per_epoch + 1}): {what}, "
            f"{self.bad_steps} bad steps in a row. The last batch: {', '.join(suspects[:NAMES_SHOWN])}{more} (listed "
            f"in {self.folder / checkpoint.BAD_BATCH}). The last good checkpoint is {self.checkpoint or 'none yet'}; "
            "lower optimizer.lr, set optimizer.clip_grad, or look at these pictures."
        )

    def _show(self, bar: tqdm, outcome: Outcome) -> None:
        bar.update()
        if self.step % self.config.output.log_steps and self.step % self.steps_per_epoch:
            return
        speed = self._speed()
        lr = learning_rate(self.raw_optimizer)
        best = max((row["top1"] for row in self.history), default=None)
        line = (
            f"loss {outcome.loss:.4f}, lr {lr:.2e}, {speed['images_per_second']:.0f} images/s, "
            f"{speed['ms_per_step']:.0f} ms/step, {peak_memory(self.accelerator.device):.1f} GiB, "
            f"{'' if best is None else f'best top-1 {best:.2f}, '}ETA {self._remaining(speed['ms_per_step'])}"
        )
        bar.set_postfix_str(line)
        if bar.disable and self.step % self.steps_per_epoch:  # a log file; the epoch's own line follows its last step
            self.accelerator.print(f"step {self.step}: {line}", flush=True)
        self.events.add(
            self.step, train__loss=outcome.loss, train__lr=lr, train__grad_norm=outcome.grad_norm, **{
                f"speed__{name}": value for name, value in speed.items()
            }
        )  # fmt: skip

    def _speed(self) -> dict[str, float]:
        """Of the epoch so far."""
        steps = (self.step - 1) % self.steps_per_epoch + 1
        seconds = self.progress["seconds"] / steps
        return {"ms_per_step": 1000 * seconds, "images_per_second": self.global_batch / seconds}

    def _remaining(self, ms_per_step: float) -> str:
        """The time that the run still needs, evaluation included."""
        steps = self.config.train.epochs * self.steps_per_epoch - self.step
        evaluations = self.config.train.epochs - len(self.history)
        evaluation = self.history[-1]["val_seconds"] if self.history else 0.0
        return duration(steps * ms_per_step / 1000 + evaluations * evaluation)

    def _announce(self) -> None:
        config, accelerator = self.config, self.accelerator
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        stated = config.optimizer.lr_batch_size
        peak = config.optimizer.lr * lr_scale(config, self.global_batch)
        scaling = "" if stated is None else f" ({config.optimizer.lr:g} for {stated}, scaled linearly)"
        shared = f", {config.parallel.mode}" if accelerator.num_processes > 1 else ""
        accelerator.print(
            f"{self.description['hvt.model']}, {millions:.2f} M parameters, on {accelerator.num_processes} x "
            f"{accelerator.device.type}{shared}, precision {self.precision}\n"
            f"{len(self.train_data)} training and {len(self.val_data)} held-out pictures of "
            f"{len(self.train_data.class_names)} classes, {config.data.input_size[1]}x{config.data.input_size[2]}\n"
            f"global batch {self.global_batch}, {self.steps_per_epoch} steps per epoch, learning rate "
            f"{peak:g}{scaling}, {warmup_epochs(config)} epochs of warm-up"
        )
        if self.step:
            done = self.step % self.steps_per_epoch
            within = f", {done} steps into epoch {self.step // self.steps_per_epoch + 1}" if done else ""
            accelerator.print(f"resumed after step {self.step}{within}")

    def _record(self, epoch: int, result: Evaluation, val_seconds: float) -> None:
        trained = self.progress
        row = {
            "epoch": epoch + 1,
            "step": self.step,
            "train_loss": trained["loss"] / max(trained["steps"], 1),
            "lr": learning_rate(self.raw_optimizer),
            **self._speed(),
            "peak_memory_gib": peak_memory(self.accelerator.device),
            "val_loss": result.loss,
            "top1": result.top1,
            "top5": result.top5,
            "val_images": result.images,
            "val_correct": result.correct1,
            "val_seconds": val_seconds,
            "seconds": trained["seconds"] + val_seconds,
            "skipped_steps": self.skipped_steps,
            "unreadable": sum(map(len, map(self._count_unreadable, (self.unreadable, self.unreadable_held_out)))),
        }
        improved = all(row["top1"] > earlier["top1"] for earlier in self._own())
        self.history.append(row)
        self.progress = {"loss": 0.0, "steps": 0, "seconds": 0.0}
        weights = self._weights(self.evaluated)
        if self.accelerator.is_main_process:
            self._write(weights, row, improved)
        width = len(str(self.config.train.epochs))
        passed = f"  {row['unreadable']} unreadable pictures" if row["unreadable"] else ""
        self.accelerator.print(
            f"epoch {epoch + 1:{width}}/{self.config.train.epochs}  loss {row['train_loss']:.4f}  lr {row['lr']:.2e}  "
            f"held-out loss {result.loss:.4f}  top-1 {result.top1:.2f}  top-5 {result.top5:.2f}  "
            f"{row['images_per_second']:.0f} images/s  {row['ms_per_step']:.0f} ms/step  "
            f"{row['peak_memory_gib']:.1f} GiB  ETA {self._remaining(row['ms_per_step'])}{passed}"
            f"{'  *' if improved else ''}",
            flush=True,
        )
        self.events.add(
            self.step, train__epoch_loss=row["train_loss"], val__loss=result.loss, val__top1=result.top1,
            val__top5=result.top5,
        )  # fmt: skip
        self.events.flush()

    def _write(self, weights: Mapping[str, torch.Tensor], row: Mapping[str, float], improved: bool) -> None:
        """What an epoch leaves beside its checkpoint."""
        described = {**self.description, "hvt.epoch": str(row["epoch"]), "hvt.top1": f"{row['top1']:.4f}"}
        if improved:
            checkpoint.save_weights(self.folder, checkpoint.BEST_WEIGHTS, weights, described)
        checkpoint.save_weights(self.folder, checkpoint.LAST_WEIGHTS, weights, described)
        write_log(self.folder, self.history)
        described_run = self.config.as_dict()
        # a recipe that replaces a run without being asked would be a trap
        described_run["output"] |= {"resume": None, "overwrite": False, "allow_changes": False}
        settings = yaml.safe_dump(described_run, sort_keys=False)
        checkpoint.write_atomically(self.folder / checkpoint.CONFIG, lambda path: path.write_text(settings))
        if row["epoch"] == 1:  # --overwrite: what the old run wrote at its end would pass for this run's
            for name in (checkpoint.METRICS, checkpoint.CURVES, checkpoint.REPORT):
                (self.folder / name).unlink(missing_ok=True)

    def _finish(self, seconds: float) -> dict[str, Any]:
        best = max(self._own() or self.history, key=lambda row: row["top1"])
        metrics = {
            "model": self.description["hvt.model"],
            "epochs": len(self.history),
            "steps": self.step,
            "best": _finite(best, "epoch", "top1", "top5", "val_loss", "val_correct", "val_images"),
            "last": _finite(self.history[-1], "epoch", "top1", "top5", "val_loss"),
            "train_seconds": sum(row["seconds"] for row in self.history),
            "images_per_second": self.history[-1]["images_per_second"],
            "ms_per_step": self.history[-1]["ms_per_step"],
            "skipped_steps": self.skipped_steps,
            "unreadable": self.history[-1]["unreadable"],
        }
        if self.accelerator.is_main_process:
            text = json.dumps(metrics, indent=2) + "\n"
            checkpoint.write_atomically(self.folder / checkpoint.METRICS, lambda path: path.write_text(text))
            title = f"{metrics['model']}, {len(self.train_data.class_names)} classes, seed {self.config.train.seed}"
            plot_curves(self.history, self.folder / checkpoint.CURVES, title=title)
            unreadable = sorted(self.unreadable.names | self.unreadable_held_out.names)
            write_report(
                self.folder,
                metrics=metrics,
                history=self.history,
                config=self.config,
                title=title,
                unreadable=unreadable,
            )
        self.accelerator.print(
            f"best top-1 {best['top1']:.2f} % in epoch {best['epoch']}; {seconds:.0f} s; results are in {self.folder}"
        )
        return metrics


def _finite(row: Mapping[str, float], *names: str) -> dict[str, float | None]:
    return {name: row[name] if math.isfinite(row[name]) else None for name in names}  # JSON has no NaN


def _attempt(action: Any) -> str | None:
    """Run `action`; why a file could not be written, or None."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        return getattr(error, "strerror", None) or "no room, or the write was cut"
    return None


def _grouped(stream: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    while len(group := list(islice(stream, count))) == count:
        yield group


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest of the groups: that of the head, where layers decay."""
    return max(group["lr"] for group in optimizer.param_groups)
