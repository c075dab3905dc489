"""A run: model, data, optimiser and schedule of one configuration, and the steps that remain."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from hvt_backbones import Classifier, InputError, SimMIM
from hvt_backbones.atomic import whole_file

from . import distributed
from .checkpoint import files
from .checkpoint.manager import Saver, on_main
from .config import Config
from .data.loading import Batch, Loader, batches, eval_loader, open_data, to_device, train_loader
from .data.pictures import Unreadable
from .objective import Classification, Objective, Reconstruction
from .progress import Evaluation, Progress
from .reporting.journal import Journal
from .reporting.log import listed, peak_memory
from .signals import StoppedError, StopRequest, contact
from .state import Learner, Outcome, build_model, describe_model

SEED_STRIDE = 100_003  # between the seeds of two runs; ranks count upward from each


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    objective: Objective | None = None,
    *,
    stop: StopRequest | None = None,
    unreadable: Unreadable | None = None,
) -> Evaluation:
    """What the objective measures, over all ranks' loaders.

    Args:
        model: not wrapped by DDP: the ranks' numbers of batches may differ. One that is sharded gathers its weights
            with every batch, so the ranks that have fewer repeat their last one without counting it.
        objective: by default that of a classifier.
        stop: looked at before each batch; all processes end where one has got a signal.
        unreadable: counts the pictures that are passed over.

    Raises:
        StoppedError: a signal came to one of the processes.
    """
    stop, objective = stop or StopRequest(), objective or Classification()
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
        if _asked_to_stop(stop, accelerator, agree=sharded):
            sums[4] = 1
            break
        sums[:4] += objective.measure(model, batch, accelerator)
        if unreadable is not None:
            unreadable.add(batch.unreadable)
    for module in training:
        module.training = True
    *figures, stops = accelerator.reduce(sums, "sum").tolist()
    if stops:
        raise StoppedError(stop.number or signal.SIGTERM)
    return objective.evaluation(figures)


def _asked_to_stop(stop: StopRequest, accelerator: Accelerator, *, agree: bool) -> bool:
    """Whether a signal has come: to this process, or, where they have to `agree`, to any."""
    if not agree:
        return stop.number > 0
    asked = torch.tensor(float(stop.number > 0), device=accelerator.device)
    torch.distributed.all_reduce(asked)
    return bool(asked)


def _padded(loader: Loader, accelerator: Accelerator) -> Iterator[Batch]:
    """This rank's batches, the last one repeated without its targets until the longest rank is through."""
    most = torch.tensor(len(loader), device=accelerator.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    count, batch = 0, None
    for count, batch in enumerate(batches(loader, accelerator.device), start=1):  # noqa: B007
        yield batch
    if batch is None:  # fewer pictures than ranks: this one borrows the first
        batch = to_device(loader.collate_fn([loader.dataset[0]]), loader, accelerator.device)
    for _ in range(int(most) - count):
        yield batch._replace(targets=batch.targets[:0], unreadable=[])


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a number."""


class Trainer:
    """Everything that a configuration asks for, built; `run` trains.

    Everything that can be wrong with the input is found before the output folder is made, except for pictures that
    turn out to be unreadable.

    Attributes:
        config: of the run.
        train_data, val_data: for training and for evaluation.
        train_loader, val_loader: of this process's part of them.
        description: of the model, as its weights carry it.
        accelerator: accelerate's.
        learner: the model and what changes it.
        progress: how far the run is.
        saver: of checkpoints.
        journal: tells of the run.
        stop: whether a signal has come.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        files.check_output(config.output, benchmark=bool(config.train.benchmark_steps))
        self.folder = files.run_folder(config.output)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        self.train_data, self.val_data = open_data(config.data, config.augmentation, config.train.seed)
        set_seed(config.train.seed)
        class_names = self.train_data.class_names
        self.accelerator = accelerator = distributed.build_accelerator(
            config.train, config.parallel, batch_size=config.data.batch_size, clip_grad=config.optimizer.clip_grad
        )
        model, weights = self._build_model()
        self.description = describe_model(config.model, model, config.data, class_names, config.masked)
        objective: Objective
        if isinstance(model, SimMIM):
            objective = Reconstruction(config.simmim, model, config.data.input_size[1:], len(self.val_data))
        else:
            objective = Classification(config.augmentation, len(class_names))
        self.progress = self._load_data()
        self.learner = Learner(
            model,
            accelerator,
            objective,
            weights=weights,
            optimizer=config.optimizer,
            schedule=config.schedule,
            train=config.train,
            parallel=config.parallel,
            global_batch=self.progress.global_batch,
            steps_per_epoch=self.progress.steps_per_epoch,
        )
        self.stop = StopRequest()
        set_seed(config.train.seed + SEED_STRIDE * (1 + accelerator.process_index))
        parts = accelerator, self.learner, self.progress
        self.saver = Saver(
            config.output,
            *parts,
            settings=config.as_dict(),
            description=self.description,
            pictures=len(self.train_data),
        )
        if not config.train.benchmark_steps:
            self.saver.restore()
        self.journal = Journal(
            config, *parts, description=self.description, train_data=self.train_data, val_data=self.val_data
        )

    def _build_model(self) -> tuple[Classifier | SimMIM, dict[str, Tensor] | None]:
        """The model of the configuration; without its weights where they will lie in shards: then the first process
        builds and reads it for all, and it alone has them.
        """
        config, weights = self.config, {}

        def build() -> Classifier | SimMIM:
            data, classes = config.data, len(self.train_data.class_names)
            return build_model(config.model, data.input_size[0], classes, config.masked)

        def build_for_all() -> Classifier | SimMIM:
            model = build()
            weights.update(model.state_dict())
            return model.to("meta")

        if not distributed.is_sharded(self.accelerator, config.parallel):
            return build(), None
        return on_main(self.accelerator, build_for_all), weights

    def _load_data(self) -> Progress:
        """Build the loaders; how far a run over them is at its begin."""
        train, data, accelerator = self.config.train, self.config.data, self.accelerator
        here = {
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "pin": accelerator.device.type != "cpu",
        }
        self.train_loader = train_loader(
            self.train_data, data, seed=train.seed, accumulation=train.accumulation, **here
        )
        self.val_loader = eval_loader(self.val_data, data.batch_size, data.workers, **here)
        global_batch = data.batch_size * train.accumulation * accelerator.num_processes
        steps_per_epoch = len(self.train_loader) // train.accumulation
        if steps_per_epoch == 0:
            raise InputError(
                f"data.batch_size: {len(self.train_data)} training pictures do not fill one batch of "
                f"{global_batch} (batch_size x accumulation x processes); lower it."
            )
        return Progress(
            epochs=train.epochs,
            steps_per_epoch=steps_per_epoch,
            global_batch=global_batch,
            unreadable=Unreadable(self.train_data),
            unreadable_held_out=Unreadable(self.val_data),
        )

    def run(self) -> dict[str, Any]:
        """Train the steps that remain; returns the contents of `metrics.json`.

        Raises:
            StoppedError: SIGTERM or SIGINT came; the step was finished and saved.
            DivergedError: `train.max_bad_steps` steps in a row had a loss or gradient that is no number.
            InputError: a picture that cannot be read, or a file that cannot be written.
        """
        with ExitStack() as stack, self.stop:
            on_main(self.accelerator, lambda: str(stack.enter_context(files.output_folder(self.folder))))
            if not all(gather_object([(self.folder / files.LOCK).is_file()])):  # not after an epoch
                raise InputError(
                    f"output.dir: not every process sees {self.folder}; give an --output-dir that all nodes share."
                )
            if self.accelerator.is_main_process:
                files.remove_leftovers(self.folder)
            try:
                with contact(
                    lambda: f"at step {self.progress.step}; the last checkpoint is {self.saver.checkpoint or 'none'}"
                ):
                    return self._run()
            finally:
                self.journal.close()

    def _run(self) -> dict[str, Any]:
        self.journal.announce()
        start = time.perf_counter()
        for epoch in range(len(self.progress.history), self.progress.epochs):
            self._train_epoch(epoch)
            self.saver.save()
            begin = time.perf_counter()
            result = evaluate(
                self.learner.evaluated,
                self.val_loader,
                self.accelerator,
                self.learner.objective,
                stop=self.stop,
                unreadable=self.progress.unreadable_held_out,
            )
            improved = self.progress.end_epoch(
                result,
                val_seconds=time.perf_counter() - begin,
                lr=self.learner.learning_rate,
                peak_memory_gib=peak_memory(self.accelerator.device),
            )
            self.journal.end_epoch(improved=improved)
        return self.journal.finish(time.perf_counter() - start)

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch that remain, with checkpoints on the way."""
        accelerator, learner, progress = self.accelerator, self.learner, self.progress
        done = progress.step - epoch * progress.steps_per_epoch
        accumulation, save_steps = self.config.train.accumulation, self.config.output.save_steps
        self.train_loader.batch_sampler.set_position(epoch, done * accumulation)
        learner.wrapped.train()
        learner.scheduler.step_update(progress.step)
        groups = _grouped(batches(self.train_loader, accelerator.device), accumulation)
        with tqdm(
            total=progress.steps_per_epoch,
            initial=done,
            desc=f"epoch {epoch + 1}/{progress.epochs}",
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=None if accelerator.is_main_process else True,  # None: only where a person watches
        ) as bar:
            begin = time.perf_counter()
            for group in islice(groups, progress.steps_per_epoch - done):
                for batch in group:
                    progress.unreadable.add(batch.unreadable)
                with self.journal.diagnosis.during(progress.step + 1, group[0].images):
                    outcome = learner.step(group, progress.step + 1, self.stop)
                progress.step += 1
                now = time.perf_counter()
                self._count(outcome, group, now - begin)
                begin = now
                self.journal.show_step(bar, outcome)
                if outcome.stop:
                    self.saver.save()
                    raise StoppedError(self.stop.number or signal.SIGTERM)
                if save_steps and progress.step % save_steps == 0:
                    self.saver.save()
                    begin = time.perf_counter()

    def _count(self, outcome: Outcome, group: Sequence[Batch], seconds: float) -> None:
        """Sum up a step, and end the run after too many bad ones."""
        progress = self.progress
        progress.epoch["seconds"] += seconds
        if outcome.applied:
            progress.bad_steps = 0
            progress.epoch["loss"] += outcome.loss
            progress.epoch["steps"] += 1
            return
        progress.skipped_steps += 1
        scaler, where = self.accelerator.scaler, f"step {progress.step}"
        if outcome.overflow and scaler.get_scale() >= 1.0:
            self.accelerator.print(f"{where}: fp16 overflow, step skipped, loss scale {scaler.get_scale():g}")
            return
        progress.bad_steps += 1
        what = f"loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        self.accelerator.print(f"{where}: {what}: step skipped ({progress.bad_steps} in a row)")
        if progress.bad_steps < self.config.train.max_bad_steps:
            return
        names = [self.train_data.filename(int(index)) for batch in group for index in batch.indices]
        suspects = gather_object(names if outcome.local_loss_is_bad else [])
        suspects = suspects or gather_object(names)
        listing = self.folder / files.BAD_BATCH
        if self.accelerator.is_main_process:
            text = "\n".join(suspects) + "\n"
            with whole_file(listing) as path:
                path.write_text(text)
        epoch = (progress.step - 1) // progress.steps_per_epoch + 1
        raise DivergedError(
            f"training diverged at {where} (epoch {epoch}): {what}, {progress.bad_steps} bad steps in a row. "
            f"The last batch: {listed(suspects)} (listed in {listing}). "
            f"The last good checkpoint is {self.saver.checkpoint or 'none yet'}; "
            "lower optimizer.lr, set optimizer.clip_grad, or look at these pictures."
        )


def _grouped(stream: Iterator[Batch], count: int) -> Iterator[list[Batch]]:
    while len(group := list(islice(stream, count))) == count:
        yield group
