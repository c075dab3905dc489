"""The soak's short form of one part ends without a fault, and a fault would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak import __main__ as soak
from soak import parts, recount
from soak.commands import GROWTH, Row, growth_of, run


@pytest.mark.slow
def test_a_few_samples(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Of one part: each takes minutes, and its commands are tested on their own; `make soak` runs them all."""
    status = soak.main(["--short", "detection", "--out", str(tmp_path / "table.txt")])
    assert status == 0, capfd.readouterr().out
    assert "detection: " in (tmp_path / "table.txt").read_text()


def test_a_prediction_that_is_another_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def part(folder: Path, *, short: bool):
        row = Row("tampered")
        parts.compare(row, "top-1", 100.0, recount.top1({"a": 1, "b": 0}, {"a": 1, "b": 1}), 0.01)
        yield row
        raise ValueError("broken")

    monkeypatch.setitem(soak.PARTS, "video", part)
    assert soak.main(["video"]) == 1
    said = capsys.readouterr().out
    assert "fault of tampered: top-1 is 100 by the command, 50 recounted" in said
    assert "fault of video: broken off: ValueError: broken" in said


def test_memory_that_is_kept_is_growth_and_a_large_picture_is_not() -> None:
    assert growth_of([1000 + 2 * index for index in range(600)]) > GROWTH
    assert growth_of([2000 if 300 < index < 400 else 1000 + index % 7 for index in range(600)]) < 1.01


def test_what_a_command_says_is_read() -> None:
    row = Row("command")
    run(row, "hvt_backbones", "no-such-command")
    run(row, "json.tool", "/no/such/file", status=2)
    run(
        row, "timeit", "-n1", "-r1", "import warnings; warnings.warn('no picture is named'); raise ValueError", status=1
    )
    assert row.faults[0].startswith("hvt_backbones ended with 2, not 0: error: ")
    assert row.faults[1].startswith("timeit printed a traceback")
    assert len(row.faults) == 2
    assert any("UserWarning: no picture is named" in warning for warning in row.warnings)
    assert row.peak > 1
