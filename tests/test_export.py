"""`hvt export` in every format, and the commands that take its files: they give the figures of the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import classification.validate
from hvt_backbones import InputError, create_classifier, export
from hvt_backbones.cli import main
from hvt_backbones.export import export_model
from hvt_backbones.exported import load_exported
from hvt_backbones.model_file import metadata_of, open_model
from hvt_backbones.weights.files import save_state_dict
from hvt_backbones.weights.published import Preprocessing

from .families import images, randomise

CLASSES = ["cat", "dog", "llama", "newt", "owl"]
PREPARED = Preprocessing(input_size=(3, 48, 40), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), crop_pct=0.8)
TINY = {"embed_dims": [8, 16], "depths": [1, 1], "num_heads": [1, 2], "mlp_ratios": [4, 4], "sr_ratios": [4, 2]}
FILES = {"onnx": "m.onnx", "torch-export": "m.pt2", "openvino": "m.xml"}
formats = pytest.mark.parametrize("form", FILES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says all of itself, and pictures of two of its classes."""
    root = tmp_path_factory.mktemp("export")
    model = randomise(create_classifier("pvt_v2_b0", num_classes=len(CLASSES), **TINY))
    facts = metadata_of("pvt_v2_b0", TINY, PREPARED, class_names=CLASSES)
    save_state_dict(model.state_dict(), root / "model.safetensors", facts)
    pixels = numpy.random.default_rng(0).integers(0, 256, (6, 6, 7, 3), dtype=numpy.uint8)
    for index, picture in enumerate(pixels):
        place = root / "pictures" / CLASSES[index % 2] / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((90, 70)).save(place)
    return root


def run(*arguments: object) -> None:
    assert main([str(word) for word in arguments]) == 0


def predicted(capsys: pytest.CaptureFixture, source: Path, pictures: Path) -> dict[str, dict[str, float]]:
    capsys.readouterr()
    run("predict", source, pictures, "--json")
    found = json.loads(capsys.readouterr().out)["predictions"]
    return {one["image"]: {guess["name"]: guess["probability"] for guess in one["top"]} for one in found}


@pytest.mark.slow
@formats
def test_commands_give_the_figures_of_the_checkpoint(form: str, folder: Path, tmp_path: Path, capsys) -> None:
    checkpoint, pictures, file, maps = folder / "model.safetensors", folder / "pictures", tmp_path / FILES[form], None
    run("export", checkpoint, "--format", form, "--output", file)
    assert "checked against the model" in (said := capsys.readouterr().out)
    assert all(size in said for size in ("48x40", "57x53", "35x30", f"wrote {file}"))
    theirs, ours = predicted(capsys, checkpoint, pictures), predicted(capsys, file, pictures)
    assert {image: pytest.approx(guesses, abs=1e-5) for image, guesses in theirs.items()} == ours

    maps = tmp_path / "maps" / FILES[form]
    run("export", checkpoint, "--format", form, "--output", maps, "--maps")
    for source in (checkpoint, maps):
        for options in ([], ["--stages", 1, "--size", 50, 75]):
            output = tmp_path / f"{source.suffix}{len(options)}.safetensors"
            run("features", source, pictures, "--output", output, *options)
    for count in (0, 5):
        expected, found = (load_file(tmp_path / f"{path.suffix}{count}.safetensors") for path in (checkpoint, maps))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    capsys.readouterr()
    reports = []
    for source in (checkpoint, file):
        assert classification.validate.main([str(source), "--data-dir", str(pictures), "--json", "--workers", "0"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    for fact in ("top1", "top5", "loss", "images", "classes_with_pictures", "input_size", "crop_pct"):
        assert reports[1][fact] == pytest.approx(reports[0][fact], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny", "video_swin_tiny"])
def test_windows_that_shrink_and_clips(name: str, tmp_path: Path) -> None:
    """Classifiers of windows, whose last maps are smaller than these, by names of images and of clips."""
    arch = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
    model = randomise(create_classifier(name, num_classes=len(CLASSES), **arch)).eval()
    facts = metadata_of(name, arch, PREPARED, class_names=CLASSES)
    save_state_dict(model.state_dict(), tmp_path / "model.safetensors", facts)
    file = tmp_path / "model.onnx"
    run("export", tmp_path / "model.safetensors", "--format", "onnx", "--output", file, "--torchscript")
    for size in ((61, 43), (20, 90)):
        x = images(name, *size)
        with torch.no_grad():
            torch.testing.assert_close(load_exported(file)(x), model(x), rtol=1e-4, atol=1e-4)
    calibrated = ["--format", "onnx", "--output", str(tmp_path / "q.onnx"), "--int8", "--calibrate", str(tmp_path)]
    Image.new("RGB", (50, 50)).save(tmp_path / "picture.png")
    assert main(["export", str(tmp_path / "model.safetensors"), *calibrated]) == (2 if name.startswith("video") else 0)


@pytest.mark.slow
def test_a_compiled_package(folder: Path, tmp_path: Path, capsys) -> None:
    checkpoint, file = folder / "model.safetensors", tmp_path / "compiled.pt2"
    run("export", checkpoint, "--format", "aoti", "--output", file, "--static", 48, 40)
    theirs = predicted(capsys, checkpoint, folder / "pictures")
    assert {image: pytest.approx(guesses, abs=1e-5) for image, guesses in theirs.items()} == predicted(
        capsys, file, folder / "pictures"
    )
    assert load_exported(file).facts.class_names == CLASSES


@pytest.mark.slow
@pytest.mark.parametrize(("form", "how"), [(form, "half") for form in FILES] + [("onnx", "int8"), ("openvino", "int8")])
def test_smaller_numbers(form: str, how: str, folder: Path, tmp_path: Path) -> None:
    plain, small = tmp_path / "plain" / FILES[form], tmp_path / FILES[form]
    options = ["--half"] if how == "half" else ["--int8", "--calibrate", folder / "pictures"]
    for file, more in ((plain, []), (small, options)):
        run("export", folder / "model.safetensors", "--format", form, "--output", file, *more)
    model = open_model(str(folder / "model.safetensors")).classifier()
    exported, x = load_exported(small), images("pvt_v2", 61, 43)
    assert exported.facts.dtype == {"half": "float16", "int8": "int8"}[how]
    with torch.no_grad():
        expected, found = model(x), exported(x)
    assert found.dtype == torch.float32
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert 0 < error < (1e-2 if how == "half" else 0.2)
    if how == "half" and form != "torch-export":  # whose text is longer than this model's weights
        weights = [file.with_suffix(".bin") if form == "openvino" else file for file in (plain, small)]
        assert weights[1].stat().st_size < 0.9 * weights[0].stat().st_size


def test_one_size_alone(folder: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "static.onnx"
    run("export", folder / "model.safetensors", "--format", "onnx", "--output", file, "--static", 32, 56)
    session = onnxruntime.InferenceSession(file)
    assert [*session.get_inputs()[0].shape] == ["batch", 3, 32, 56]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["hvt.class_names"]) == CLASSES
    assert json.loads(facts["hvt.input_size"]) == [3, 32, 56]
    assert json.loads(facts["hvt.mean"]) == [0.5, 0.4, 0.3]
    run("predict", file, folder / "pictures")
    assert load_exported(file)(torch.zeros(3, 3, 32, 56)).shape == (3, len(CLASSES))
    with pytest.raises(InputError, match="made for 32x56 alone, not for 64x64"):
        load_exported(file)(torch.zeros(1, 3, 64, 64))


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    model = randomise(create_classifier("pvt_v2_b0", num_classes=2, **TINY)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    errors = export_model(
        model,
        tmp_path / "half.pt2",
        "pvt_v2_b0",
        format="torch-export",
        half=True,
        preprocessing=PREPARED,
        static=(48, 40),
    )
    assert list(errors) == ["48x40"]
    assert model.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_file_that_gives_other_values_is_not_written(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    other = randomise(create_classifier("pvt_v2_b0", num_classes=len(CLASSES), **TINY)).eval()
    torch.nn.init.ones_(other.head.weight)
    write = export._write

    def write_another(model: export.Portable, *arguments: object) -> None:
        write(export.Portable(other, torch.float32), *arguments)

    monkeypatch.setattr(export, "_write", write_another)
    command = [
        "export",
        str(folder / "model.safetensors"),
        "--format",
        "torch-export",
        "--output",
        str(tmp_path / "a.pt2"),
    ]
    assert main(command) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "onnx", "--output", "a.pt2"], "a file of onnx ends in .onnx"),
        (["--format", "tflite", "--output", "a.tflite"], "choose from"),
        (["--format", "onnx", "--output", "a.onnx", "--half", "--int8", "--calibrate", "."], "contradicts"),
        (["--format", "onnx", "--output", "a.onnx", "--int8"], "needs --calibrate DIR"),
        (["--format", "onnx", "--output", "a.onnx", "--calibrate", "."], "needs --calibrate DIR"),
        (["--format", "onnx", "--output", "a.onnx", "--int8", "--calibrate", "empty"], "holds no pictures"),
        (["--format", "aoti", "--output", "a.pt2", "--int8", "--calibrate", "."], "--int8 is for"),
        (["--format", "torch-export", "--output", "a.pt2", "--torchscript"], "--torchscript is for"),
        (["--format", "onnx", "--output", "a.onnx", "--static", "0", "32"], "is not a whole number from 1"),
        (["--format", "onnx", "--output", "a.onnx", "--static", "32"], "takes height width, got 1"),
        (["--format", "onnx", "--output", "a.onnx", "--stages", "1"], "add that"),
        (["--format", "onnx", "--output", "folder.onnx"], "is a folder"),
        (["--format", "onnx", "--output", "a.onnx", "--device", "cuda"], "is for --format aoti"),
    ],
)
def test_bad_exports_are_one_line(
    arguments: list[str], said: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.onnx").mkdir()
    assert main(["export", str(folder / "model.safetensors"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "folder.onnx"]


def test_a_package_that_is_missing_is_named_with_its_command(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("hvt_backbones.exported.find_spec", lambda name: None)
    command = ["export", str(folder / "model.safetensors"), "--format", "onnx", "--output", str(tmp_path / "a.onnx")]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        "error: --format onnx needs the package onnx: pip install 'hvt_backbones[export]'\n"
    )


@pytest.mark.slow
def test_onnx_runtime_reports_nothing_to_its_makers(folder: Path, tmp_path: Path) -> None:
    """What it is about to send it keeps in the user's folder."""
    variables = {key: text for key, text in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    variables |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    file = tmp_path / "a.onnx"
    words = ["export", folder / "model.safetensors", "--format", "onnx", "--torchscript", "--output", file]
    for command in (words, ["predict", file, folder / "pictures"]):
        subprocess.run([sys.executable, "-m", "hvt_backbones", *map(str, command)], env=variables, check=True)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


@pytest.mark.slow
def test_a_signal_after_openvinos_files_is_answered(folder: Path, tmp_path: Path) -> None:
    """It ended the process on CPUs with AMX, without a word: see `openvino_core`."""
    file = tmp_path / "a.xml"
    run("export", folder / "model.safetensors", "--format", "openvino", "--torchscript", "--output", file)
    script = f"""
import signal, torch
from hvt_backbones.exported import load_exported
first, second = (load_exported({str(file)!r}) for _ in range(2))
first(torch.zeros(1, 3, 48, 40)), second(torch.zeros(1, 3, 48, 40))
del first
del second
signal.signal(signal.SIGUSR1, lambda *_: print("answered"))
signal.raise_signal(signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "answered\n")


@pytest.mark.parametrize("name", ["a.onnx", "a.xml", "a.pt2"])
def test_files_that_are_none_are_one_line(name: str, folder: Path, tmp_path: Path, capsys) -> None:
    pictures = str(folder / "pictures")
    assert main(["predict", str(tmp_path / name), pictures]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / name).write_bytes(b"nothing of the kind")
    assert main(["predict", str(tmp_path / name), pictures]) == 2
    assert "cannot be read as" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    commands = (
        ["diagnose", "--data", pictures, "--output", str(tmp_path / "d.png")],
        ["reconstruct", pictures, "--output", str(tmp_path / "r.png")],
    )
    for command, *more in commands:
        assert main([command, str(tmp_path / name), *more]) == 2
        assert "is an exported model, which `hvt predict`" in capsys.readouterr().err


def test_exported_files_say_what_they_are_for(folder: Path, tmp_path: Path, capsys) -> None:
    checkpoint, pictures = folder / "model.safetensors", str(folder / "pictures")
    for more, command in (([], "features"), (["--maps", "--stages", "0"], "predict")):
        file = tmp_path / f"{command}.pt2"
        run("export", checkpoint, "--format", "torch-export", "--output", file, "--static", 32, 32, *more)
        output = ["--output", str(tmp_path / "maps.npz")] if command == "features" else []
        assert main([command, str(file), pictures, *output]) == 2
        assert f"returns {'classes' if command == 'features' else 'feature maps'}" in capsys.readouterr().err
    maps = str(tmp_path / "predict.pt2")
    assert main(["features", maps, pictures, "--output", str(tmp_path / "maps.npz"), "--stages", "1"]) == 2
    assert "has stage0, not stage1" in capsys.readouterr().err
    assert main(["predict", maps, pictures, "--model", "swin_tiny"]) == 2
    assert "leave them out" in capsys.readouterr().err
    foreign = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), foreign)
    assert main(["predict", str(foreign), pictures]) == 2
    assert "was not written by `hvt export`" in capsys.readouterr().err
