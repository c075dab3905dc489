"""The checkpoints of a run, written and read by all its processes together."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from hvt_backbones import InputError
from hvt_backbones.model_file import entry

from ..config import OutputConfig
from ..progress import Progress
from ..state import Learner
from . import files
from .files import CHECKPOINTS, MANIFEST, damage, held_run, newest_sound
from .shards import SHARDS, write_shards

# Settings that may differ when a run goes on: they change where and how it runs, not what it computes.
FREE_SETTINGS = (
    "output.", "model.max_logits", "data.dir", "data.workers", "data.on_error", "data.max_errors", "train.device",
    "train.threads", "train.benchmark_steps", "parallel.timeout", "parallel.cpu_offload", "simmim.picture_epochs",
)  # fmt: skip


@dataclass(eq=False)
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

    output: OutputConfig
    accelerator: Accelerator
    learner: Learner
    progress: Progress
    settings: Mapping[str, Mapping[str, Any]]
    description: Mapping[str, str]
    pictures: int
    checkpoint: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.folder = files.run_folder(self.output)

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
            **self.learner.state(sharded=self.output.sharded),
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
        parts = state.pop("parts", None)
        problem = None
        if accelerator.is_main_process:
            problem = _attempt(lambda: staging.mkdir(parents=True))
        accelerator.wait_for_everyone()
        if problem is None and not staging.is_dir():
            problem = "not every process sees the folder, which all nodes must share"
        if problem is None:
            problem = _attempt(lambda: save_generators(staging / self._generators(), accelerator.device))
            self.learner.save_engine(staging)
            if parts is not None:
                problem = _attempt(lambda: write_shards(staging / SHARDS, parts)) or problem
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
            keep = {"keep_last": self.output.keep_last, "keep_best": self.output.keep_best}
            files.prune(self.folder, self.progress.own, **keep)

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
        differences = self._check_same_run(state)
        for difference in differences:
            accelerator.print(f"changed: {difference}")
        self.learner.restore(path, state, same_settings=not differences)
        progress.restore(state)
        generators = path / self._generators()
        if generators.is_file() and state["processes"] == accelerator.num_processes:
            load_generators(generators, accelerator.device)
        if path.parent.parent.resolve() == self.folder.resolve():
            self.checkpoint = path
        else:  # another run's: this one has saved nothing yet
            progress.inherited = len(progress.history)

    def _check_same_run(self, state: Mapping[str, Any]) -> list[str]:
        """The settings that differ from those of a checkpoint's `state`.

        Raises:
            InputError: it is of another model or other classes; settings differ and that is not allowed; or it is or
                would be DeepSpeed's, and of another mode or number of processes.
        """
        for name in ("model", "overrides", "class_names"):
            before, now = entry(state["description"], name), entry(self.description, name)
            if before != now:
                raise InputError(
                    f"output.resume: the checkpoint is of another model: {name} {before} there, {now} here."
                )
        differences = changed_settings(state["config"], self.settings)
        for name, there, here in (
            ("global batch", state["global_batch"], self.progress.global_batch),
            ("training pictures", state["pictures"], self.pictures),
        ):
            if there != here:
                differences.append(f"{name} {there} there, {here} here")
        if differences and not self.output.allow_changes:
            raise InputError(
                f"output.resume: settings differ from the checkpoint's: {'; '.join(differences)}. Give them as they "
                "were, or --allow-changes to go on with these."
            )
        mode, processes = state["config"]["parallel"]["mode"], state["processes"]
        own_mode, own_processes = self.learner.mode, self.accelerator.num_processes
        if "zero" in mode + own_mode and (mode, processes) != (own_mode, own_processes):
            raise InputError(
                f"output.resume: DeepSpeed's state fits its own mode and processes alone: {mode} on {processes} "
                f"there, {own_mode} on {own_processes} here. Go on with those, or begin a new run from the weights: "
                "--model.pretrained FILE."
            )
        return differences

    def _generators(self) -> str:
        return f"rank_{self.accelerator.process_index:05d}.pt"


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `output.resume` means for a run in `folder`; None where "auto" finds nothing to go on from.

    Raises:
        InputError: no such checkpoint, or a damaged one with none before it.
    """

    def warn(message: str) -> None:
        print(f"warning: {message}", flush=True)

    if resume == "auto":
        found = newest_sound(folder, warn)
        held = held_run(folder)
        if found is None and held:
            raise InputError(f"output.resume: {folder} holds {held[0]} but no checkpoint; --overwrite starts anew.")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise InputError(f"output.resume: {path} does not exist; give a checkpoint or run folder, or auto.")
    if folder.resolve() not in (path.resolve(), path.resolve().parent.parent) and held_run(folder):
        raise InputError(
            f"output.dir: {folder} already holds another run than {path}; continue it with --resume auto, or give "
            "another --output-dir."
        )
    if found := newest_sound(path, warn):
        return found
    if not (path / MANIFEST).is_file():
        raise InputError(
            f"output.resume: {path} is not a checkpoint of this trainer; give a folder {CHECKPOINTS}/step_*."
        )
    if reason := damage(path):
        raise InputError(f"output.resume: {path} is damaged ({reason}); give another checkpoint.")
    return path


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`optimizer.lr 0.001 there, 0.002 here`, for each setting that matters and differs."""
    there, here = (
        {f"{section}.{name}": value for section, values in part.items() for name, value in values.items()}
        for part in (before, now)
    )
    pairs = {key: (there.get(key, "absent"), here.get(key, "absent")) for key in there | here}
    return [
        f"{key} {old} there, {new} here"
        for key, (old, new) in pairs.items()
        if old != new and not key.startswith(FREE_SETTINGS)
    ]


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


def _attempt(action: Callable[[], object]) -> str | None:
    """Run `action`; why a file could not be written, or None."""
    try:
        action()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        return getattr(error, "strerror", None) or "no room, or the write was cut"
    return None


def save_generators(path: Path, device: torch.device) -> None:
    """Write the states of this process's random generators."""
    numpy_state = np.random.get_state()  # noqa: NPY002 timm's mixup draws from it
    assert isinstance(numpy_state, tuple)  # it can be asked for a dictionary
    name, keys, *rest = numpy_state
    torch.save(
        {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
        },
        path,
    )


def load_generators(path: Path, device: torch.device) -> None:
    state = torch.load(path, map_location="cpu", weights_only=True)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"], device)


@cache  # asked once: files may change while the run goes on
def revision() -> str | None:
    """The commit of this checkout, with a `+` where files have changed since; None outside of one."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=60
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
