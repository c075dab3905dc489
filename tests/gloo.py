"""The threads of PyTorch's backend for the CPU."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path


def gloo_threads() -> int:
    """How many threads of gloo this process has, of those that have begun to work: they name themselves then."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            names.append(path.read_text())
    return sum("gloo" in name for name in names)


def gloo_threads_are_gone(within: float = 60) -> bool:
    """Whether this process is without threads of gloo, so that Python shuts down safely. For some time (seconds), as
    one that was joined may be listed still.
    """
    end = time.monotonic() + within
    while gloo_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not gloo_threads()
