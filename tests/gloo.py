"""The threads of PyTorch's backend for the CPU."""

from __future__ import annotations

from pathlib import Path


def gloo_threads() -> int:
    """How many threads of gloo this process has. Python shuts down safely when there is none."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
