"""Shared by all tests: few threads (the workers share the cores), fixed seeds, where the reference cases lie."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# ONNX Runtime and OpenVINO would report their use, from threads of their own and from forks of this process
os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "CI": "true"}

with contextlib.suppress(ImportError):  # gpu_check.sh goes without
    from hypothesis import settings

    # the same examples each time, however long the machine takes for one
    settings.register_profile("repeatable", deadline=None, derandomize=True)
    settings.load_profile("repeatable")

# what a shell starts in the background ignores Ctrl-C, and so would the commands that the tests start and interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demos and the soak first: the process that began one last would work alone for minutes."""
    items.sort(key=lambda item: item.path.name not in ("test_demo.py", "test_soak.py"))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def reference_dir() -> Path:
    """The folder of reference cases: `HVT_REFERENCE_DIR`, or `shared/reference` beside the checkout."""
    return Path(os.environ.get("HVT_REFERENCE_DIR") or ROOT.parent / "shared" / "reference")
