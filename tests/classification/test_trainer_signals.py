"""Runs that are told to stop save, and go on from there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from classification import signals as stop_module
from classification.checkpoint import files as checkpoint
from classification.signals import StopRequest

from .saved_runs import ROOT, assert_nothing_else, assert_same, forked_runs, learned, newest


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_from_there(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("signals", pictures, tmp_path)
    assert (result["whole"], result["whole of two"]) == ([0], [0, 0])
    wholes = {1: learned(tmp_path / "whole"), 2: learned(tmp_path / "whole of two")}
    steps = {"in a step": 3, "while loading": 2, "while saving": 3, "in validation": 6, "while writing weights": 7}
    for stopped in result["stopped"]:
        name, world = stopped["name"], len(stopped["statuses"])
        keyboard = name.endswith("keyboard") or name.startswith(
            ("while loading", "while seal", "while writing", "both")
        )
        assert stopped["statuses"] == [130 if keyboard else 143] * world, stopped
        assert stopped["seconds"] < 300, stopped
        said = stopped["said"]
        assert "Traceback" not in said, said
        assert "Warning" not in said, said
        line = f"stopped by {'SIGINT' if keyboard else 'SIGTERM'}; --resume auto goes on"
        assert [end for end in said.splitlines() if end.endswith(line)] == said.splitlines()[-world:], said
        assert stopped["step"] == steps.get(name, stopped["step"]) > 0, stopped
        assert stopped["end"] == [0] * world
        assert_same(wholes[world], learned(tmp_path / name), name)
        assert_nothing_else(tmp_path / name)
    early = result["interrupted at the start"]
    assert (early["statuses"], early["said"], early["end"]) == ([130], "interrupted\n", [0])


def maps_of(pid: int) -> str:
    """The files that a process has opened as programs: what it has imported so far."""
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_an_interrupt_while_the_imports_run_is_one_line(seconds: float, pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::UserWarning", "-m", "classification.train", "digits", "--epochs", "1000",
               "--data-dir", str(pictures),
               "--data.kind", "imagefolder", "--batch-size", "4", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while "libtorch" not in maps_of(process.pid) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert re.fullmatch(r"interrupted\n|stopped by SIGINT; --resume auto goes on\n", error)


@pytest.mark.slow
def test_the_command_stops_with_its_workers(pictures: Path, tmp_path: Path) -> None:
    """The whole of it, from a shell: a signal to the process group, while two workers decode."""
    # PyTorch warns of more workers than cores
    command = [
        sys.executable, "-W", "ignore::UserWarning", "-m", "classification.train", "digits", "--epochs", "1000",
        "--data-dir", str(pictures), "--data.kind", "imagefolder", "--batch-size", "4", "--data.workers", "2",
        "--schedule.warmup_epochs", "0", "--model.overrides.embed_dim", "24", "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 300
    while process.poll() is None and not checkpoint.list_checkpoints(tmp_path / "run") and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    try:
        output, error = process.communicate(timeout=900)
    finally:
        process.kill()
    assert (process.returncode, error) == (143, "stopped by SIGTERM; --resume auto goes on\n"), output
    assert checkpoint.damage(newest(tmp_path / "run")) is None


def test_a_second_interrupt_ends_at_once_but_a_doubled_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module, "TOGETHER", 600.0)  # that a busy machine is not too slow for the second
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        stop._since -= 601
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
