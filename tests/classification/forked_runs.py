"""Runs that are killed, told to stop or fed with nonsense: `python forked_runs.py SCENARIO DATA FOLDER [NUMBER ...]`.

PyTorch and the trainer are imported once, every run is a fork of this process (two for two ranks), and signals are
real ones. Prints what happened as JSON; the tests that start them say what should have.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.backends.backend_agg  # else each run would import it
import matplotlib.figure  # noqa: F401
import torch

import classification.benchmark  # noqa: F401
from classification import trainer
from classification.checkpoint import files as checkpoint
from classification.checkpoint import manager as saver
from classification.data.pictures import Pictures
from classification.reporting import journal
from classification.state import TrainStep
from classification.train import main
from tests.ports import free_port

# what is killed, and how often of 20 times
KILLS = {"step": 6, "save": 3, "seal": 3, "weights": 2, "validation": 3, "start": 1, "run": 2}
# of two ranks both are killed at once, and every so many times one alone, which the other has to notice
ALONE = 5
EPOCHS = 10  # enough that a run is not through before the last kill
PHASES = {
    "start": (trainer.Trainer, "__init__"),
    "run": (trainer.Trainer, "_run"),
    "load": (Pictures, "load"),
    "step": (TrainStep, "__call__"),
    "save": (saver.Saver, "save"),
    "seal": (checkpoint, "seal_checkpoint"),
    "validation": (trainer, "evaluate"),
    "weights": (journal, "save_state_dict"),
}
NUMBERS = {phase: number for number, phase in enumerate(["none", *PHASES])}
Prepare = Callable[["Phases"], None]


def recipe(data: Path, folder: Path, world: int, workers: int, epochs: int, *, masked: bool) -> list[str]:
    """Whatever draws from a random generator is on."""
    overrides = "{patch_size: 4, window_size: 4, embed_dim: 8, depths: [1, 1], num_heads: [2, 4], drop_path_rate: 0.3}"
    settings = {
        "model.overrides": overrides, "data.kind": "imagefolder", "data.dir": data, "data.workers": workers,
        "data.batch_size": 4 // world, "augmentation.auto_augment": "rand-m5-mstd0.5",
        "augmentation.random_erasing": 0.5, "augmentation.mixup": 0.8, "augmentation.cutmix": 1.0,
        "train.epochs": epochs, "train.device": "cpu", "train.ema_decay": 0.9, "train.threads": 1,
        "optimizer.lr": 5e-3, "schedule.warmup_epochs": 1, "output.save_steps": 2, "output.tensorboard": "false",
        "output.dir": folder, "parallel.timeout": 300,
    }  # fmt: skip
    if masked:
        settings |= {"train.task": "simmim", "simmim.mask_patch_size": 8, "simmim.picture_epochs": 1}
        settings |= {"augmentation.mixup": 0, "augmentation.cutmix": 0}
    return ["digits", *(f"--{key}={value}" for key, value in settings.items())]


class Phases:
    """Wraps the parts of a run: to time them, or to kill or to wait within one of them.

    Attributes:
        shared: with the parent: the number of the phase that goes on, whether a wait has begun, whether it may end.
        seconds: per phase, how long each call took.
    """

    def __init__(self, shared: mmap.mmap) -> None:
        self.shared = shared
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.kill: tuple[str, int, float] | None = None  # phase, call of it, seconds from its begin
        self.wait: tuple[str, int] | None = None
        for phase, (owner, name) in PHASES.items():
            self._wrap(phase, owner, name)

    def _wrap(self, phase: str, owner: object, name: str) -> None:
        function: Callable = getattr(owner, name)

        def wrapped(*args, **settings):
            before = self.shared[0]
            self.shared[0] = before if phase == "load" else NUMBERS[phase]  # pictures are loaded in any phase
            call = (phase, len(self.seconds[phase]) + 1)
            doomed = self.kill is not None and self.kill[:2] == call
            if doomed:
                threading.Timer(self.kill[2], os.kill, (os.getpid(), signal.SIGKILL)).start()
            begin = time.perf_counter()
            if self.wait == call:
                self.shared[1] = 1
                while not self.shared[2]:
                    time.sleep(0.01)
            result = function(*args, **settings)
            self.seconds[phase].append(time.perf_counter() - begin)
            if doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            self.shared[0] = before
            return result

        setattr(owner, name, wrapped)


class Runs:
    """Forks that train.

    Args:
        data, folder: of the pictures; under which each run has its folder and its `.txt` with what it said.
        world, workers: ranks, and worker processes of each.
        epochs: of each run.
        masked: let them paint what is hidden, as SimMIM.
    """

    def __init__(
        self, data: Path, folder: Path, world: int = 1, workers: int = 0, epochs: int = 2, *, masked: bool = False
    ) -> None:
        self.data, self.folder, self.world, self.workers, self.epochs = data, folder, world, workers, epochs
        self.masked = masked
        self.random = random.Random(f"{world} {workers}")
        folder.mkdir(exist_ok=True)

    def start(self, name: str, prepare: Sequence[Prepare], options: Sequence[str]) -> list[tuple[int, mmap.mmap]]:
        """Begin a run; process id and shared bytes of each rank."""
        port = free_port()
        return [self._fork(name, rank, port, prepare[rank % len(prepare)], options) for rank in range(self.world)]

    def _fork(self, name: str, rank: int, port: int, prepare: Prepare, options: Sequence[str]) -> tuple[int, mmap.mmap]:
        shared = mmap.mmap(-1, 3)
        if pid := os.fork():
            return pid, shared
        status = 99
        try:
            os.setpgid(0, 0)
            signal.alarm(600)  # its default ends a run that hangs
            if self.world > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "LOCAL_WORLD_SIZE": self.world}
                os.environ |= {key: str(value) for key, value in (place | {"MASTER_PORT": port}).items()}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            output = os.open(f"{self.folder / name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            phases = Phases(shared)
            prepare(phases)
            run = self.folder / name
            settings = recipe(self.data, run, self.world, self.workers, self.epochs, masked=self.masked)
            status = main([*settings, *options])
            if rank == 0 and not status:
                (self.folder / "seconds.json").write_text(json.dumps(phases.seconds))
        finally:
            os._exit(status)

    def run(self, name: str, *prepare: Prepare, options: Sequence[str] = ("--resume", "auto")) -> list[int]:
        """A run to its end; the exit statuses."""
        return [wait_for(pid) for pid, _ in self.start(name, prepare or [nothing], options)]

    def kill(self, name: str, phase: str, number: int, seconds: dict[str, list[float]]) -> dict:
        """A run that gets SIGKILL in a phase; what happened."""
        # the first rank alone writes checkpoints and weights
        victim = self.random.randrange(self.world) if phase not in ("seal", "weights") else 0
        call = self.random.randint(1, {"step": 3, "save": 2, "seal": 2}.get(phase, 1))
        typical = sorted(seconds[phase])[len(seconds[phase]) // 2] / (2 * self.epochs if phase == "run" else 1)
        delay = self.random.uniform(0, typical)

        def doom(phases: Phases) -> None:
            phases.kill = phase, call, delay

        prepare = [doom if rank == victim else nothing for rank in range(self.world)]
        children = self.start(name, prepare, ["--resume", "auto"])
        status = wait_for(children[victim][0])
        others = []
        for rank, (pid, _) in enumerate(children):
            if rank != victim:
                if number % ALONE or phase == "start":
                    os.kill(pid, signal.SIGKILL)
                others.append(wait_for(pid))
        within = list(NUMBERS)[children[victim][1][0]]
        return {"aim": phase, "phase": within, "status": status, "others": others}

    def signal(self, name: str, number: int, phase: str, call: int, *, ranks: Sequence[int] = (0,)) -> dict:
        """A run whose `ranks`, with their workers, get a signal within a phase; what happened."""

        def hold(phases: Phases) -> None:
            phases.wait = phase, call

        children = self.start(name, [hold], ["--resume", "auto"])
        wait_until(lambda: all(children[rank][1][1] for rank in ranks))
        begin = time.monotonic()
        for rank in ranks:
            os.killpg(children[rank][0], number)
        for _, shared in children:
            shared[2] = 1
        statuses = [wait_for(pid) for pid, _ in children]
        return {
            "name": name,
            "statuses": statuses,
            "seconds": time.monotonic() - begin,
            "said": (self.folder / f"{name}.txt").read_text(),
            "step": max(map(checkpoint.step_of, checkpoint.list_checkpoints(self.folder / name)), default=0),
            "end": self.run(name),
        }


def nothing(phases: Phases) -> None:
    pass


def wait_until(true: Callable[[], bool | int], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def relay(data: Path, folder: Path, world: int, workers: int, kills: int, masked: int) -> dict:
    """One run through `kills` kills, beside one that is left alone."""
    runs = Runs(data, folder, world, workers, EPOCHS, masked=bool(masked))
    whole = runs.run("whole")
    seconds = json.loads((folder / "seconds.json").read_text())
    aims = [phase for phase, count in KILLS.items() for _ in range(count)]
    runs.random.shuffle(aims)
    happened = [runs.kill("killed", phase, number, seconds) for number, phase in enumerate(aims[:kills])]
    return {"whole": whole, "kills": happened, "end": runs.run("killed")}


def signals(data: Path, folder: Path) -> dict:
    """Runs that are told to stop, and then go on to their end."""
    one, busy, two = (Runs(data, folder, *counts) for counts in ((1, 0), (1, 1), (2, 0)))
    term, interrupt = signal.SIGTERM, signal.SIGINT
    return {
        "whole": one.run("whole"),
        "whole of two": two.run("whole of two"),
        "stopped": [
            one.signal("in a step", term, "step", 3),
            one.signal("while loading", interrupt, "load", 10),
            one.signal("while saving", term, "save", 1),
            one.signal("while sealing", interrupt, "seal", 2),
            one.signal("in validation", term, "validation", 1),
            one.signal("while writing weights", interrupt, "weights", 1),
            busy.signal("with workers", term, "step", 3),
            busy.signal("with workers by keyboard", interrupt, "step", 3),
            busy.signal("with workers in validation", term, "validation", 1),
            two.signal("one of two in a step", term, "step", 3, ranks=[1]),
            two.signal("one of two in validation", term, "validation", 1, ranks=[1]),
            two.signal("both of two", interrupt, "validation", 1, ranks=[0, 1]),
        ],
        "interrupted at the start": one.signal("at the start", interrupt, "start", 1),
    }


def bad_picture(data: Path, folder: Path) -> dict:
    """Of two ranks one gets a picture that is no number."""

    def spoil(phases: Phases) -> None:
        load = Pictures.load

        def spoiled(pictures: Pictures, index: int) -> tuple[torch.Tensor, int]:
            image, target = load(pictures, index)
            return (image * float("nan") if pictures.filename(index).endswith("train/b/3.png") else image), target

        Pictures.load = spoiled

    runs = Runs(data, folder, world=2)
    statuses = runs.run("run", spoil, options=["--train.max_bad_steps", "1"])
    return {"statuses": statuses, "said": (folder / "run.txt").read_text()}


def locked(data: Path, folder: Path) -> dict:
    """Two runs at the same time in one folder, of two ranks each."""

    def slowly(phases: Phases) -> None:
        phases.wait = "step", 1

    runs = Runs(data, folder, world=2)
    first = runs.start("run", [slowly], [])
    wait_until(lambda: first[0][1][1])
    second = runs.run("run")
    for _, shared in first:
        shared[2] = 1
    return {"second": second, "said": (folder / "run.txt").read_text(), "first": [wait_for(pid) for pid, _ in first]}


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    scenario, data, folder, *numbers = sys.argv[1:]
    print(json.dumps(globals()[scenario](Path(data), Path(folder), *map(int, numbers))))
