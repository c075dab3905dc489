"""Commands as a user types them, with what they said and the memory that they took."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
# what must not be in any log: the beginnings of a traceback and of Python's and the frameworks' warnings
TRACEBACK = re.compile(r"^Traceback ", re.MULTILINE)
WARNING = re.compile(r"^.*(?:\w*Warning: |- WARNING - ).*$", re.MULTILINE)
LONG = 120  # looks at a command's memory, one in a second: growth is judged of those that run for minutes
GROWTH = 1.15
PATHS = re.compile(r"\S*/\S+|\d+(?:\.\d+)?")


@dataclass
class Row:
    """One line of the table at the end.

    Attributes:
        name: of the pipeline and of what was done.
        short: a few samples, which tell nothing of whether memory grows, however long they take.
        amount: samples or iterations.
        faults: what went wrong, a line each.
        warnings: the different ones, without numbers and paths.
        peak: MiB of the processes together.
    """

    name: str
    short: bool = False
    amount: int = 0
    faults: list[str] = field(default_factory=list)
    warnings: set[str] = field(default_factory=set)
    peak: float = 0.0
    seconds: float = 0.0


def memory(process: psutil.Process) -> float:
    """MiB of a process and of those that it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # they end meanwhile
        for one in [process, *process.children(recursive=True)]:
            total += one.memory_info().rss
    return total / MIB


def run(
    row: Row,
    module: str,
    *arguments: object,
    processes: int = 1,
    status: int = 0,
    kill_when: Callable[[], bool] | None = None,
    limit: float = 1800.0,
    may_grow: bool = False,
) -> str:
    """`python -m MODULE ARGUMENT...` from the checkout; faults, warnings, peak and seconds go to the row.

    Args:
        processes: started by torchrun where more than one.
        status: the exit status that is right.
        kill_when: asked five times a second; where it says so, the process is killed (SIGKILL), which is right then.
        limit: seconds after which it is killed, which is a fault.
        may_grow: its memory; for what looks at that by itself.

    Returns:
        What it printed.
    """
    series: list[float] = []  # of memory
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
        # what is freed goes back at once: else glibc may keep the room of a large picture, which looks like growth
        "MALLOC_MMAP_THRESHOLD_": str(MIB),
    }  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if time.perf_counter() > start + len(series):
                series.append(memory(watched))
            late = time.perf_counter() > start + limit
            if late:
                row.faults.append(f"{module} did not end within {limit:.0f} s")
            if late or (kill_when is not None and kill_when()):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            time.sleep(0.2)
        log.seek(0)
        said = log.read()
    row.seconds += time.perf_counter() - start
    row.peak = max(row.peak, *series)
    if not (may_grow or row.short) and len(series) >= LONG and (growth := growth_of(series)) > GROWTH:
        row.faults.append(f"memory of {module} grows: {growth:.2f} times as much in the third quarter as in the second")
    killed = kill_when is not None and process.returncode == -signal.SIGKILL
    if kill_when is not None and not killed:
        row.faults.append(f"{module} ended before it could be killed: that it resumes was not tried")
    elif not killed and process.returncode != status:
        row.faults.append(f"{module} ended with {process.returncode}, not {status}: {_last_line(said)}")
    if TRACEBACK.search(said):
        row.faults.append(f"{module} printed a traceback: {_last_line(said)}")
    row.warnings |= {PATHS.sub("_", line).strip()[:160] for line in WARNING.findall(said)}
    return said


def growth_of(series: Sequence[float]) -> float:
    """What is kept in the third quarter over that in the second: the first warms up, the last may evaluate.

    What is kept is what nine in ten looks are above of: a large picture adds to the others.
    """
    quarter = len(series) // 4
    second, third = (statistics.quantiles(series[n * quarter : (n + 1) * quarter], n=10)[0] for n in (1, 2))
    return third / second


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "nothing was printed"


def table(rows: Sequence[Row]) -> str:
    """A line for each row, then every fault and every warning."""
    lines = [f"{'pipeline':<58} {'amount':>7} {'faults':>6} {'warnings':>8} {'peak MiB':>8} {'s':>6}"]
    for row in rows:
        counts = f"{row.amount:>7} {len(row.faults):>6} {len(row.warnings):>8} {row.peak:>8.0f} {row.seconds:>6.0f}"
        lines.append(f"{row.name:<58} {counts}")
    lines += [f"fault of {row.name}: {fault}" for row in rows for fault in row.faults]
    lines += [f"warning: {text}" for text in sorted(set().union(*(row.warnings for row in rows)))]
    return "\n".join(lines)
