"""`classification.validate` and the demo's pieces: the figure of training again, from the file alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from classification.checkpoint import files as checkpoint
from classification.validate import main
from demos.classification import draw_predictions, predict
from hvt_backbones import create_classifier
from hvt_backbones.weights.files import save_state_dict

Run = Callable[..., tuple[int, str]]
HERE = ("--workers", "0", "--device", "cpu")


@pytest.fixture
def trained(quick_run: Run, tmp_path: Path) -> Path:
    assert quick_run("--lr", "1e-2")[0] == 0
    return tmp_path / "run"


@pytest.fixture
def validated(capsys: pytest.CaptureFixture) -> Callable[..., dict[str, Any]]:
    """The command's JSON."""

    def run(source: Path | str, data: Path, *options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([str(source), "--data-dir", str(data), "--json", *HERE, *options]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


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
    assert "device      1 x cpu, fp32" in text
    assert len(text.splitlines()) == 10

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
    assert result["crop_pct"] == 0.9  # of the variant table, no data settings were given
    assert main([str(weights), *options]) == 2
    assert "--model" in capsys.readouterr().err
    assert main([str(weights), "--model", "swin_tiny", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_run_folder_and_full_checkpoint(
    trained: Path, small_data: Path, validated: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    figures = ("top1", "loss", "images", "input_size", "crop_pct", "model")

    def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
        return [left[name] for name in figures] == [right[name] for name in figures]

    assert same(validated(trained, small_data), validated(trained / checkpoint.BEST_WEIGHTS, small_data))
    last = checkpoint.list_checkpoints(trained)[-1]
    # the recipe averages its weights: those are what an epoch saves, and not what the optimiser steps
    expected = validated(trained / checkpoint.LAST_WEIGHTS, small_data)
    state = torch.load(last / checkpoint.STATE, weights_only=True)
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["ema"])
    assert same(validated(last, small_data), expected)
    assert same(validated(last / checkpoint.STATE, small_data), expected)

    for name in (checkpoint.BEST_WEIGHTS, checkpoint.LAST_WEIGHTS):
        (trained / name).unlink()
    assert same(validated(trained, small_data), expected)  # a run that was cut before its first epoch's end

    (last / checkpoint.STATE).write_bytes((last / checkpoint.STATE).read_bytes()[:-1])
    assert main([str(last), "--data-dir", str(small_data), *HERE]) == 2
    assert "state.pt has" in capsys.readouterr().err
    assert main([str(small_data), "--data-dir", str(small_data), *HERE]) == 2
    assert "is a folder without model_best.safetensors" in capsys.readouterr().err


def test_numbered_folders_are_classes_by_index(
    tmp_path: Path, validated: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    """As ImageNet-V2 has them: 10 comes before 2 as text, and not as a class."""
    torch.manual_seed(0)
    weights = create_classifier("pvt_v2_b0", num_classes=12)
    torch.nn.init.zeros_(weights.head.weight)
    weights.head.bias.data = torch.eye(12)[2]  # whatever the picture: class 2
    names = [f"n{index:02}" for index in range(12)]
    metadata = {"hvt.model": "pvt_v2_b0", "hvt.class_names": json.dumps(names)}
    save_state_dict(weights.state_dict(), tmp_path / "weights.safetensors", metadata)
    for index in range(12):
        (tmp_path / "val" / str(index)).mkdir(parents=True)
        for copy in range(3 if index == 2 else 1):
            Image.new("RGB", (40, 40)).save(tmp_path / "val" / str(index) / f"{copy}.png")
    result = validated(tmp_path / "weights.safetensors", tmp_path, "--size", "32")
    assert (result["images"], result["correct"], result["classes"]) == (14, 3, 12)
    # a foreign file without names: by value, or as torchvision numbers them, where class 2 is folder 10
    save_state_dict(weights.state_dict(), tmp_path / "foreign.safetensors", {"hvt.model": "pvt_v2_b0"})
    foreign = tmp_path / "foreign.safetensors", tmp_path, "--size", "32"
    assert validated(*foreign)["correct"] == 3
    assert validated(*foreign, "--class-order", "text")["correct"] == 1
    for index in (0, 3, 11):  # the numbers that are left keep their classes
        shutil.rmtree(tmp_path / "val" / str(index))
    result = validated(*foreign)
    assert (result["images"], result["correct"], result["classes_with_pictures"]) == (11, 3, 9)
    assert main([str(foreign[0]), "--data-dir", str(tmp_path), *HERE, "--size", "32"]) == 0
    assert "class folder 1 is taken for class 1, counted from 0" in capsys.readouterr().err
    assert validated(*foreign, "--class-order", "text")["correct"] == 1
    (tmp_path / "map.txt").write_text("\n".join(map(str, [2, 1, 0, 3, 4, 5, 6, 7, 8])))  # folder 1 is class 2
    assert validated(*foreign, "--class-map", str(tmp_path / "map.txt"))["correct"] == 1


def test_unreadable_pictures(
    trained: Path, small_data: Path, validated: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture
) -> None:
    broken = small_data / "val" / "dark" / "1.png"
    broken.write_bytes(b"no picture")
    data = ("--data-dir", str(small_data), *HERE)
    result = validated(trained, small_data, "--on-error", "skip", "--max-errors", "0.2")
    assert (result["images"], result["unreadable"]) == (5, [str(broken)])
    assert main([str(trained), *data, "--on-error", "skip", "--max-errors", "0.2"]) == 0
    assert "right, 1 unreadable left out)" in capsys.readouterr().out
    assert main([str(trained), *data, "--on-error", "skip"]) == 0  # 1 % of six pictures is less than one: one it is
    assert main([str(trained), *data, "--on-error", "skip", "--max-errors", "0"]) == 2
    assert "error: --max-errors: 1 of 6 pictures" in capsys.readouterr().err
    assert main([str(trained), *data]) == 2
    error = capsys.readouterr().err
    assert "--on-error skip" in error
    assert "data." not in error


def test_tar_files_and_named_splits(
    trained: Path, small_data: Path, tmp_path: Path, validated: Callable[..., dict[str, Any]], capsys: Any
) -> None:
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(small_data / "val", arcname=".")
    expected = validated(trained, small_data)
    for data in (tmp_path, tmp_path / "val.tar"):
        result = validated(trained, data, "--kind", "tar")
        assert (result["correct"], result["loss"]) == (expected["correct"], pytest.approx(expected["loss"]))
    # a split that was asked for and is not there is no reason to take everything
    assert main([str(trained), "--data-dir", str(small_data / "val"), "--split", "test", *HERE]) == 2
    assert "test" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_count_every_picture_once(
    trained: Path, small_data: Path, tmp_path: Path, validated: Callable[..., dict[str, Any]]
) -> None:
    Image.new("RGB", (40, 36), (120, 100, 110)).save(small_data / "val" / "dark" / "seventh.png")
    (small_data / "val" / "dark" / "eighth.png").write_bytes(b"no picture")
    options = ["--batch-size", "2", "--on-error", "skip", "--max-errors", "0.2"]
    alone = validated(trained, small_data, *options)
    assert (alone["images"], alone["processes"]) == (7, 1)
    target = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "classification.validate", str(trained), "--data-dir", str(small_data), "--json", str(target),
               *HERE, *options]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1") == 1
    both = json.loads(target.read_text())
    assert both["processes"] == 2
    for name in ("images", "correct", "top1", "unreadable"):
        assert both[name] == alone[name]
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)


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
    (tmp_path / "taken.json").mkdir()
    assert "taken.json was not written (Is a directory)" in refused(*data, "--json", str(tmp_path / "taken.json"))
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
