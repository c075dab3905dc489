"""`classification.validate` and the demo's pieces: the figure of training again, from the file alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from classification import checkpoint
from classification.demo import draw_predictions, predict
from classification.validate import main

Run = Callable[..., tuple[int, str]]
HERE = ("--workers", "0", "--device", "cpu")


@pytest.fixture
def trained(quick_run: Run, tmp_path: Path) -> Path:
    assert quick_run("--lr", "1e-2")[0] == 0
    return tmp_path / "run"


def test_validate_gives_the_figures_of_training(
    trained: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = str(trained / checkpoint.BEST_WEIGHTS)
    target = tmp_path / "result.json"
    assert main([weights, "--data-dir", str(small_data), "--json", str(target), "--batch-size", "2", *HERE]) == 0
    text = capsys.readouterr().out
    result = json.loads(target.read_text())
    best = json.loads((trained / checkpoint.METRICS).read_text())["best"]
    assert (result["images"], result["correct"]) == (6, best["val_correct"])
    assert result["top1"] == best["top1"]
    assert result["loss"] == pytest.approx(best["val_loss"], rel=1e-4)
    assert f"top-1       {best['top1']:.2f} %" in text
    assert "images      6 (" in text

    assert main([weights, "--data-dir", str(small_data / "val"), "--json", *HERE]) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == best["val_correct"]
    assert main([weights, "--data-dir", str(small_data), "--split", "train", "--json", *HERE]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12


def test_a_named_model_takes_foreign_files(tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture) -> None:
    """A file without our metadata, of a published architecture, in timm's layout."""
    import timm

    weights = tmp_path / "foreign.safetensors"
    save_file(timm.create_model("pvt_v2_b0", num_classes=2).state_dict(), weights)
    options = ["--data-dir", str(small_data), "--size", "64", *HERE]
    assert main([str(weights), "--model", "pvt_v2_b0", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["input_size"], result["model"]) == (6, [3, 64, 64], "pvt_v2_b0")
    assert main([str(weights), *options]) == 2
    assert "--model" in capsys.readouterr().err
    assert main([str(weights), "--model", "swin_tiny", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bad_input(trained: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = str(trained / checkpoint.BEST_WEIGHTS)

    def refused(*argv: str) -> str:
        assert main([weights, *HERE, *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    data = ("--data-dir", str(small_data))
    assert "--data-dir" in refused()
    assert "does not exist" in refused("--data-dir", str(tmp_path / "nowhere"))
    assert "--batch-size" in refused(*data, "--batch-size", "0")
    assert "--crop-pct" in refused(*data, "--crop-pct", "nan")
    assert "--json" in refused(*data, "--json", str(tmp_path / "no folder" / "x.json"))
    shutil.copytree(small_data / "val" / "dark", small_data / "val" / "dusk")
    assert "dusk only in" in refused(*data)
    shutil.rmtree(small_data / "val" / "dusk")
    (small_data / "val" / "dark" / "1.png").write_bytes(b"no picture")
    assert "1.png cannot be read" in refused(*data)


def test_another_number_of_classes(
    trained: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = tmp_path / "without names.safetensors"
    save_file(load_file(trained / checkpoint.BEST_WEIGHTS), weights, {"hvt.model": "swinv2_tiny_window8"})
    shutil.copytree(small_data / "val" / "dark", small_data / "val" / "dusk")
    assert main([str(weights), "--data-dir", str(small_data), *HERE]) == 2
    assert "2 classes apart" in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_are_drawn(trained: Path, small_data: Path, tmp_path: Path) -> None:
    pictures = sorted((small_data / "val").glob("*/*.png"))
    predictions = predict(trained / checkpoint.BEST_WEIGHTS, pictures)
    assert [path for path, _ in predictions] == pictures
    assert {guess["top"][0]["name"] for _, guess in predictions} <= {"bright", "dark"}
    draw_predictions(predictions, tmp_path / "predictions.png")
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 1000
