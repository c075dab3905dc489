"""Every signal and every lost process: how a run, its workers and a command that is still importing answer them.

It imports nothing that takes long, for `interrupted_at_once` is there while that goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

TOGETHER = 1.0  # seconds; a terminal and a launcher may both pass on the same Ctrl-C
PARTING = 5.0  # seconds between the last that is heard of a process and its end
HEAD_START = 0.5  # seconds for torchrun to see that end: the first that it sees is the cause in its report


class StoppedError(Exception):
    """A signal ended the run. `status` is the exit status that a shell expects: 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class StopRequest:
    """While open, a first SIGTERM or SIGINT is only remembered; a second SIGINT, a second later, interrupts at once.

    Attributes:
        number: the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def _remember(self, number: int, frame: types.FrameType | None) -> None:
        if self.number and number == signal.SIGINT and time.monotonic() - self._since > TOGETHER:
            raise KeyboardInterrupt
        self.number, self._since = self.number or number, self._since or time.monotonic()

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Ctrl-C ends the process within: the packages that take seconds to import do not all bear an exception there."""

    def leave(*_: object) -> NoReturn:
        os.write(2, b"interrupted\n")
        os._exit(130)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- workers that load pictures


@contextlib.contextmanager
def sigterm_later() -> Iterator[None]:
    """SIGTERM waits within: a worker that is being started does not yet know what to do with it, and inherits this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """A signal to all processes of a job is for the main one to answer: it may want to finish its step and save.

    Workers end when the main process tells them to, and within seconds when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_left_alone
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_termination, daemon=True).start()


def _report_unless_left_alone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # multiprocessing's thread that hands tensors over has nobody to hand them to once the main process is interrupted
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _await_termination() -> None:
    import multiprocessing

    import psutil

    process = multiprocessing.parent_process()  # the operating system's may be a server that forks for it
    assert process is not None
    assert process.pid is not None
    while psutil.pid_exists(process.pid):  # one that was killed tells nobody
        came = signal.sigtimedwait({signal.SIGTERM}, 5)
        if came is not None and came.si_pid == process.pid:
            break
    os._exit(0)


# ---- the other processes of a job


class LostContactError(RuntimeError):
    """Another process of the job is gone, or does not answer."""


@contextlib.contextmanager
def contact(where: Callable[[], str]) -> Iterator[None]:
    """Turn what a collective operation raises when another process is gone into one line that names that process.

    Args:
        where: says how far the run is.

    Raises:
        LostContactError: see above.
    """
    from accelerate.utils import gather_object

    members = gather_object([(int(os.environ.get("RANK", 0)), socket.gethostname(), os.getpid())])
    try:
        yield
    except RuntimeError as error:
        if not _means_lost_contact(error):
            raise
        reason = " ".join(str(error).split())[:200]
        deadline = time.monotonic() + PARTING
        while not (gone := _missing(members)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(HEAD_START)
        named = gone or "the launcher's report names the process that failed"
        raise LostContactError(f"lost contact with another process {where()}: {named} ({reason})") from error


def _means_lost_contact(error: RuntimeError) -> bool:
    import torch

    if not torch.distributed.is_initialized():
        return False
    words = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "gloo", "nccl", "hccl")
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in words)


def _missing(members: list[tuple[int, str, int]]) -> str:
    """Those (rank, host, process) of this host that have ended or were stopped, for a message; empty if none has."""
    host = socket.gethostname()
    found = [(rank, pid, _absence(pid)) for rank, where, pid in members if where == host]
    return ", ".join(f"rank {rank} (pid {pid}) {absence}" for rank, pid, absence in found if absence)


def _absence(pid: int) -> str | None:
    import psutil

    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "ended"
    return {
        psutil.STATUS_ZOMBIE: "ended", psutil.STATUS_DEAD: "ended",
        psutil.STATUS_STOPPED: "was stopped", psutil.STATUS_TRACING_STOP: "was stopped",
    }.get(status)  # fmt: skip
