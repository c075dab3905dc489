"""Small data and cheap settings for the trainer's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from classification.config import DataConfig
from classification.data.digits import lay_out_digits
from classification.data.loading import open_pictures
from classification.data.pictures import Pictures
from classification.train import main

TINY = (
    "--model.overrides={patch_size: 4, window_size: 4, embed_dim: 16, depths: [1, 1], num_heads: [2, 4], "
    "drop_path_rate: 0.0}"
)
# two epochs of a recipe on the folder of `small_data`
QUICK = (
    TINY, "--data.kind", "imagefolder", "--epochs", "2", "--schedule.warmup_epochs", "0", "--batch-size", "4",
    "--data.workers", "0", "--device", "cpu",
)  # fmt: skip


def open_at(path: Path, transform: Any, *, channels: int = 3, split: str | None = None, **settings: Any) -> Pictures:
    """The pictures in a folder; `settings` are of `DataConfig`."""
    return open_pictures(path, split, DataConfig(**settings), transform, channels=channels)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state per process; each test is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def small_data(tmp_path: Path) -> Path:
    """Two classes, dark and bright, six training and three held-out pictures each."""
    root = tmp_path / "small data"
    for split, count in (("train", 6), ("val", 3)):
        for name, level in (("bright", 190), ("dark", 30)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (level + 5 * index, level, level + 3 * index)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, of different brightness: 24 training and 12 held-out pictures."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for level, name in enumerate("abc"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 150, (36, 40, 3)) + 40 * level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def quick() -> tuple[str, ...]:
    return QUICK


@pytest.fixture
def quick_run(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """Run the trainer on `small_data` into `tmp_path / "run"`; returns its exit status and what it wrote to stderr."""

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main(
            ["digits", *QUICK, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "run"), *options]
        )
        return status, capsys.readouterr().err

    return run
