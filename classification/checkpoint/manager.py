"""The checkpoints of a run, written and read by all its processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from hvt_backbones import InputError

from .. import distributed
from ..config import OutputConfig
from ..progress import Progress
from ..state import Learner
from . import files
from .resume import check_same_run, choose_checkpoint, revision


class Saver:
    """Saves a run and goes back to what was saved; every method is a collective call.

    Args:
        output: where to, how many are kept, and what to go on from.
        accelerator: accelerate's.
        learner, progress: what is saved.
        settings: all of the run, by section, to be compared when it goes on.
        description: of the model, as its weights carry it.
        pictures: for training.

    Attributes:
        folder: of the run.
        checkpoint: the last one of this run; None where there is none yet.
    """

    def __init__(
        self, output: OutputConfig, accelerator: Accelerator, learner: Learner, progress: Progress, *,
        settings: Mapping[str, Mapping[str, Any]], description: Mapping[str, str], pictures: int,
    ) -> None:  # fmt: skip
        self.output, self.accelerator = output, accelerator
        self.learner, self.progress = learner, progress
        self.settings, self.description, self.pictures = settings, description, pictures
        self.folder = Path(output.dir)
        self.checkpoint: Path | None = None

    def _state(self) -> dict[str, Any]:
        """What all processes share."""
        return {
            "description": self.description,
            "config": self.settings,
            "revision": revision(),
            "torch": str(torch.__version__),  # its own type is not a plain value
            "processes": self.accelerator.num_processes,
            "pictures": self.pictures,
            **self.progress.state(),
            **self.learner.state(),
        }

    def save(self) -> None:
        """Write a checkpoint of this step; a run that it replaces goes only now.

        Raises:
            InputError: it cannot be written; the checkpoints before it are as they were.
        """
        accelerator, step = self.accelerator, self.progress.step
        staging = files.staging_folder(self.folder, step)
        if files.step_folder(self.folder, step) == self.checkpoint:
            return
        state = self._state()
        problem = None
        if accelerator.is_main_process:
            problem = _attempt(lambda: staging.mkdir(parents=True))
        accelerator.wait_for_everyone()
        if problem is None and not staging.is_dir():
            problem = "not every process sees the folder, which all nodes must share"
        if problem is None:
            problem = _attempt(lambda: distributed.save_generators(staging / self._generators(), accelerator.device))
            self.learner.save_engine(staging)
            if accelerator.is_main_process and problem is None:
                problem = _attempt(lambda: torch.save(state, staging / files.STATE))
        problems = [found for found in gather_object([problem]) if found]
        if accelerator.is_main_process and not problems:
            replaces = self.checkpoint is None and self.output.overwrite
            seal = files.seal_checkpoint
            problem = _attempt(lambda: seal(staging, self.folder, step, replace_run=replaces))
            problems = [problem] if problem else []
        problems = broadcast_object_list([problems])[0]
        if problems:
            if accelerator.is_main_process:
                files.remove_leftovers(self.folder)
            kept = f"the last checkpoint is {self.checkpoint}" if self.checkpoint else "there is no checkpoint yet"
            raise InputError(
                f"output.dir: the checkpoint of step {step} was not written to {self.folder} ({problems[0]}); "
                f"{kept}. Make room or give another --output-dir."
            )
        self.checkpoint = files.step_folder(self.folder, step)
        if accelerator.is_main_process:
            kept = {"keep_last": self.output.keep_last, "keep_best": self.output.keep_best}
            files.prune(self.folder, self.progress.own, **kept)

    def restore(self) -> None:
        """Go to the checkpoint that `output.resume` means, chosen by the first process for all; if there is one.

        Raises:
            InputError: there is none of that name, or it does not fit this run.
        """
        resume = self.output.resume
        if resume is None:
            return
        path = on_main(self.accelerator, lambda: choose_checkpoint(self.folder, resume))
        if path is None:
            return
        accelerator, progress = self.accelerator, self.progress
        state = files.load_state(path)
        differences = check_same_run(
            state,
            self.description,
            self.settings,
            allowed=self.output.allow_changes,
            global_batch=progress.global_batch,
            pictures=self.pictures,
        )
        for difference in differences:
            accelerator.print(f"changed: {difference}")
        distributed.check_shards(state, self.learner.mode, accelerator.num_processes)
        self.learner.restore(path, state, same_settings=not differences)
        progress.restore(state)
        generators = path / self._generators()
        if generators.is_file() and state["processes"] == accelerator.num_processes:
            distributed.load_generators(generators, accelerator.device)
        if path.parent.parent.resolve() == self.folder.resolve():
            self.checkpoint = path
        else:  # another run's: this one has saved nothing yet
            progress.inherited = len(progress.history)

    def _generators(self) -> str:
        return f"rank_{self.accelerator.process_index:05d}.pt"


def on_main(accelerator: Accelerator, action: Callable[[], Any]) -> Any:
    """What `action` returns on the first process, for all; and so with an `InputError` that it raises."""
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            answer = [(action(), None)]
        except InputError as error:
            answer = [(None, str(error))]
    broadcast_object_list(answer)
    result, problem = answer[0]
    if problem:
        raise InputError(problem)
    return result


def _attempt(action: Any) -> str | None:
    """Run `action`; why a file could not be written, or None."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        return getattr(error, "strerror", None) or "no room, or the write was cut"
    return None
