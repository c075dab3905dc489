"""`python -m classification.data`: what the data is, which pictures cannot be read, and what limits the training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from classification import benchmark as performance
from classification.data import report as data_report
from classification.data.report import cores_needed, main, verdict, worker_counts


@pytest.fixture
def options(small_data: Path) -> list[str]:
    return [
        "--data.kind",
        "imagefolder",
        "--data-dir",
        str(small_data),
        "--batch-size",
        "4",
        "--data.workers",
        "0",
        "--device",
        "cpu",
    ]


def test_the_data_is_described(options: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(options) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 12 pictures of 2 classes (bright ... dark), 6 (bright) to 6 (bright) to a class",
        "val: 6 pictures of 2 classes (bright ... dark), 3 (bright) to 3 (bright) to a class",
    ]


def test_check_lists_every_picture_that_cannot_be_read(
    small_data: Path, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(["digits", "--check", *options]) == 0
    assert "  12 of 12 can be read" in capsys.readouterr().out
    damaged = [small_data / "train/bright/1.png", small_data / "train/dark/5.png", small_data / "val/dark/0.png"]
    damaged[0].write_bytes(b"")
    for path in damaged[1:]:
        path.write_bytes(path.read_bytes()[:60])
    assert main(["digits", *options, "--check", "--data.workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "cannot" in line] == [f"  cannot be read: {path}" for path in damaged]
    assert {"  10 of 12 can be read", "  5 of 6 can be read"} <= set(lines)


def test_the_benchmark_measures_the_loader_and_names_the_bottleneck(
    options: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_report.loader_rate, "__defaults__", (0.2,))
    for device, name in ((1.0, "device"), (1e9, "data")):
        monkeypatch.setattr(performance, "device_rate", lambda config, device=device: device)
        assert main(["--benchmark", *options]) == 0
        out = capsys.readouterr().out
        assert out.startswith("12 pictures, 32x32, ")
        rates = {int(workers): float(rate) for workers, rate in re.findall(r"^ +(\d+)  +(\d+)", out, re.MULTILINE)}
        assert {0, 1} <= set(rates)
        assert all(rate > 0 for rate in rates.values())
        assert re.search(r"^ +0 .*\(data\.workers\)$", out, re.MULTILINE)
        verdict, cores = out.splitlines()[-2:]
        assert verdict.startswith(f"The {name} is the bottleneck: with data.workers = 0 the loader delivers")
        needed = re.fullmatch(r"One worker delivers (\d+) images/s: (\d+) cores keep up with this device.", cores)
        assert needed
        assert int(needed[2]) == pytest.approx(1.1 * device / rates[1], rel=0.01, abs=1)


def test_the_verdict_says_what_to_change() -> None:
    rates = {1: 100.0, 2: 190.0, 4: 360.0, 8: 380.0}
    assert verdict(rates, 4, 300.0, 8).startswith(
        "The device is the bottleneck: with data.workers = 4 the loader deliv"
    )
    assert verdict(rates, 1, 160.0, 8).endswith(
        "delivers 100 of the 160 images/s that the device trains; set data.workers = 2."
    )
    assert "; set data.workers = 8 and use more than these 8 cores, store" in verdict(rates, 1, 1000.0, 8)
    assert "; use more than these 8 cores, store the pictures as smaller JPEGs" in verdict(rates, 8, 1000.0, 8)
    assert (cores_needed(400.0, 363.0), cores_needed(400.0, 364.0), cores_needed(350.0, 2800.0)) == (1, 2, 9)
    assert worker_counts(3, 6) == [1, 2, 3, 4, 6]
    assert worker_counts(0, 1) == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "--benchmark"], "--check contradicts --benchmark"),
        (["--benchmark", "--batch-size", "many"], "data.batch_size: expected"),
        (["--benchmark", "--batch-size", "4000"], "1198 training pictures do not fill one batch of 4000"),
        (["no_recipe"], "recipe 'no_recipe' is neither"),
        (["--data.kind", "tar"], "data.dir"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, digits: Path
) -> None:
    if "4000" in words:
        words = [*words, "--data-dir", str(digits)]
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_the_command_measures_a_real_device(digits: Path) -> None:
    """As a user starts it, training step included."""
    words = ["--benchmark", "--data-dir", str(digits), "--data.workers", "1", "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "classification.data", *words], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"^    cpu  +\d+  \(training steps", result.stdout, re.MULTILINE)
    assert re.search(r"^The (device|data) is the bottleneck: ", result.stdout, re.MULTILINE)
