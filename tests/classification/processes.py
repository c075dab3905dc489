"""Trainers in several processes at once, without a launcher: children of a server that has imported everything."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from tests.gloo import gloo_threads_are_gone
from tests.ports import free_port

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "tests.classification.processes", "classification.trainer", "classification.train", "classification.command_line",
    "torch.distributed.fsdp", "torch.distributed.elastic.agent.server.local_elastic_agent",
])  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What one process saw of a run: the losses and gradient norms of its steps, and how it ended."""

    losses: list[float]
    norms: list[float]
    metrics: dict[str, Any]


def in_processes(
    count: int, function: Callable[..., Any], *arguments: Any, timeout: float = 600, only: Sequence[int] | None = None
) -> list[Any]:
    """The results of `function(*arguments)` in `count` processes of one job, by rank; of the ranks in `only`.

    Raises:
        AssertionError: one of them raised, died or took too long.
    """
    port = free_port()
    ends, children = [], []
    for rank in range(count):
        mine, theirs = SERVER.Pipe(duplex=False)
        child = SERVER.Process(target=_child, args=(rank, count, port, theirs, function, arguments), daemon=False)
        child.start()
        theirs.close()
        ends.append(mine)
        children.append(child)
    deadline = time.monotonic() + timeout
    try:
        results = []
        for rank in range(count) if only is None else only:
            end = ends[rank]
            assert end.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} gave no result in {timeout} s"
            try:
                results.append(end.recv())
            except EOFError:
                raise AssertionError(f"rank {rank} of {count} ended without a result; its traceback is above") from None
        return results
    finally:
        for rank, child in enumerate(children):
            if only is None or rank in only:
                child.join(60)
            child.kill()


def _child(
    rank: int, count: int, port: int, end: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    as_from_a_shell()
    if count > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
        )  # fmt: skip
    from hvt_backbones.processes import leave_processes

    try:
        result = function(*arguments)
    finally:
        leave_processes()
    if "fsdp2" not in arguments:  # DTensor's caches keep its group
        assert gloo_threads_are_gone()
    end.send(result)


def as_from_a_shell() -> None:
    """What a child of the server has otherwise: its workers would be the server's children too."""
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def trained(*options: str) -> Curve:
    """Train as the command line does."""
    from classification.command_line import parse_command_line
    from classification.state import TrainStep
    from classification.trainer import Trainer

    outcomes = []
    step = TrainStep.__call__

    def recorded(self: TrainStep, *arguments: Any) -> Any:
        outcomes.append(step(self, *arguments))
        return outcomes[-1]

    TrainStep.__call__ = recorded
    try:
        metrics = Trainer(parse_command_line(options)).run()
    finally:
        TrainStep.__call__ = step
    return Curve([outcome.loss for outcome in outcomes], [outcome.grad_norm for outcome in outcomes], metrics)


def die_at(last: int, how: str, *options: str) -> None:
    """The training command, whose rank 1 is killed or raises after its step `last`."""
    from classification.state import TrainStep
    from classification.train import main

    as_from_a_shell()
    step, steps = TrainStep.__call__, itertools.count(1)

    def fatal(self: TrainStep, *arguments: Any) -> Any:
        outcome = step(self, *arguments)
        if next(steps) == last and os.environ["RANK"] == "1":
            if how == "raise":
                raise ArithmeticError("as a mistake in the code would")
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    TrainStep.__call__ = fatal
    sys.exit(main(options))
