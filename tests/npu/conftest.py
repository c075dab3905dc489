"""Tests on the stand-in NPU: those of one file run in a process of their own, whose reports are shown here.

The stand-in stays in a process for good, so that it must not get into the one that runs the other tests. A test file
here is written as any other; `PYTHONPATH=tests/npu/standin pytest tests/npu` runs them in one process, for a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.classification.conftest import fresh_accelerator, small_data  # noqa: F401 fixtures of the trainer's tests
from tests.npu.standin_environment import STANDIN, standin_environment

HERE = Path(__file__).parent
REPORTS = "NPU_STANDIN_REPORTS"  # where the process of a file writes its reports
TIMEOUT = 900  # seconds


def _on_standin() -> bool:
    module = sys.modules.get("torch_npu")
    return module is not None and Path(module.__file__).is_relative_to(STANDIN)


class ReportWriter:
    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config, self.path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(self.path, "a") as file:
            file.write(json.dumps(data) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(REPORTS):
        config.pluginmanager.register(ReportWriter(config, path))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if _on_standin() or not item.path.is_relative_to(HERE):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


_ran: dict[Path, tuple[list[dict[str, Any]], str]] = {}  # reports and output, by file


def _reports(item: pytest.Item) -> Iterator[pytest.TestReport]:
    if item.path not in _ran:
        _ran[item.path] = _run([other.nodeid for other in item.session.items if other.path == item.path], item.config)
    reports, output = _ran[item.path]
    mine = [data for data in reports if data["nodeid"] == item.nodeid]
    for data in mine:
        yield item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
    if not any(data["when"] == "teardown" for data in mine):
        message = f"the process of this file ended before this test did:\n{output[-8000:]}"
        _ran[item.path] = reports, "(see the first of these failures)"
        keywords = dict.fromkeys(item.keywords, 1)
        yield pytest.TestReport(item.nodeid, item.location, keywords, "failed", message, "call")


def _run(nodeids: list[str], config: pytest.Config) -> tuple[list[dict[str, Any]], str]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "reports"
        path.touch()
        try:
            result = subprocess.run(
                [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb", config.option.tbstyle, *nodeids],
                cwd=config.rootpath,
                env={**standin_environment(), REPORTS: str(path)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
            output = result.stdout
        except subprocess.TimeoutExpired as error:
            output = f"{(error.stdout or b'').decode()}\nnot done after {TIMEOUT} s"
        return [json.loads(line) for line in path.read_text().splitlines()], output
