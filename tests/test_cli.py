"""Every subcommand of `hvt` on small models, and every bad input: one line, exit status 2, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from PIL import Image

from hvt_backbones import convert_state_dict, create_backbone, create_classifier, list_models
from hvt_backbones.cli import main
from hvt_backbones.images import read_image
from hvt_backbones.model_file import data_config, open_model
from hvt_backbones.variants import VARIANTS
from hvt_backbones.weights import convert, files, sources
from hvt_backbones.weights.files import read_weights, save_state_dict

TINY = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
CLASSES = ["cat", "dog", "llama", "newt", "owl", "pike"]


def tiny_metadata(**changes: object) -> dict[str, str]:
    """What the trainer writes beside the weights."""
    facts = {
        "model": "swin_tiny",
        "overrides": TINY,
        "num_classes": len(CLASSES),
        "class_names": CLASSES,
        "input_size": [3, 32, 32],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        **changes,
    }
    return {f"hvt.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints and some pictures."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = create_classifier("swin_tiny", num_classes=len(CLASSES), **TINY)
    torch.nn.init.normal_(model.head.weight)
    save_state_dict(model.state_dict(), root / "tiny.safetensors", tiny_metadata())
    save_state_dict(model.state_dict(), root / "foreign.pth")
    grey = create_classifier("swin_tiny", num_classes=2, in_chans=1, **TINY)
    metadata = tiny_metadata(input_size=[1, 32, 32], mean=[0.5], std=[0.5], class_names=["no", "yes"])
    save_state_dict(grey.state_dict(), root / "grey.safetensors", metadata)
    (root / "pictures" / "below").mkdir(parents=True)
    pixels = numpy.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=numpy.uint8)
    Image.fromarray(pixels[0]).save(root / "pictures" / "a.png")
    Image.fromarray(pixels[1]).convert("L").save(root / "pictures" / "b.jpg")
    Image.fromarray(pixels[2]).convert("P").save(root / "pictures" / "below" / "c.GIF")
    (root / "pictures" / "notes.txt").write_text("no picture")
    return root


def out(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


# ---- models


def test_models_prints_a_row_per_model(capsys: pytest.CaptureFixture) -> None:
    lines = out(capsys, "models").splitlines()
    assert len(lines) == 1 + len(VARIANTS)
    row = next(line for line in lines if line.startswith("swin_tiny "))
    assert row.split()[:5] == ["swin_tiny", "224", "28", "4.5", "81.2"]


def test_models_filters_by_pattern_and_family(capsys: pytest.CaptureFixture) -> None:
    lines = out(capsys, "models", "*base*", "--family", "swinv2").splitlines()[1:]
    expected = [name for name in list_models("swinv2*") if "base" in name]
    assert [line.split()[0] for line in lines] == expected != []


def test_models_as_markdown_and_json(capsys: pytest.CaptureFixture) -> None:
    lines = out(capsys, "models", "--markdown").splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| pvt_v2_b2 | 224 | 25.4 | 4.0 | 82.0 | in1k |" in lines
    rows = json.loads(out(capsys, "models", "twins_svt_*", "--json"))
    assert [row["arch"]["embed_dims"][0] for row in rows] == [96, 128, 64]


# ---- predict


def expected_probabilities(folder: Path) -> torch.Tensor:
    """The model by hand, on a picture prepared by hand."""
    model = create_classifier("swin_tiny", num_classes=len(CLASSES), **TINY).eval()
    model.load_state_dict(read_weights(folder / "tiny.safetensors").tensors)
    picture = Image.open(folder / "pictures" / "a.png").resize((40, 32), Image.Resampling.BILINEAR).crop((4, 0, 36, 32))
    tensor = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255
    tensor = (tensor - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    with torch.no_grad():
        return model(tensor[None]).softmax(-1)[0]


def test_predict_is_the_model_on_the_prepared_picture(folder: Path, capsys: pytest.CaptureFixture) -> None:
    picture = folder / "pictures" / "a.png"
    printed = out(capsys, "predict", folder / "tiny.safetensors", picture, "--json", "--device", "cpu")
    top = json.loads(printed)["predictions"][0]["top"]
    expected = expected_probabilities(folder)
    assert len(top) == 5
    assert [guess["class"] for guess in top] == expected.topk(5).indices.tolist()
    assert [guess["name"] for guess in top] == [CLASSES[guess["class"]] for guess in top]
    torch.testing.assert_close(torch.tensor([guess["probability"] for guess in top]), expected.topk(5).values)


def test_predict_takes_folders_and_prints_percentages(folder: Path, capsys: pytest.CaptureFixture) -> None:
    printed = out(capsys, "predict", folder / "tiny.safetensors", folder / "pictures", "--top-k", 2, "--device", "cpu")
    lines = printed.splitlines()
    assert lines[::3] == [str(folder / "pictures" / name) for name in ("a.png", "b.jpg", "below/c.GIF")]
    assert all("%" in line and line.split()[-1] in CLASSES for i, line in enumerate(lines) if i % 3)


def test_predict_reads_grey_pictures_for_a_grey_model(folder: Path, capsys: pytest.CaptureFixture) -> None:
    printed = out(capsys, "predict", folder / "grey.safetensors", folder / "pictures", "--json", "--device", "cpu")
    assert {guess["name"] for result in json.loads(printed)["predictions"] for guess in result["top"]} == {"no", "yes"}


@pytest.fixture
def published_pvt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """`pvt_v2_b0` as timm publishes it, brought without a network."""
    torch.manual_seed(0)
    state_dict = convert_state_dict(create_classifier("pvt_v2_b0").state_dict(), to="timm")
    file = save_state_dict(state_dict, tmp_path / "model.safetensors")

    def fetch(source: str | Path, **_: object) -> Path:
        assert source in ("hf-hub:timm/pvt_v2_b0.in1k", file)
        return file

    monkeypatch.setattr(sources, "fetch", fetch)
    return state_dict


def test_predict_by_name_uses_the_published_weights(
    published_pvt: dict[str, torch.Tensor], folder: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = out(capsys, "predict", "pvt_v2_b0", folder / "pictures" / "a.png", "--json", "--device", "cpu")
    top = json.loads(printed)["predictions"][0]["top"]
    from timm.data import ImageNetInfo

    assert [guess["name"] for guess in top] == [ImageNetInfo().index_to_description(guess["class"]) for guess in top]
    model = open_model("pvt_v2_b0").classifier()
    torch.testing.assert_close(model.head.weight.detach(), published_pvt["head.weight"])


def test_pretrained_loads_the_published_weights(
    published_pvt: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    for pretrained in (True, "in1k"):
        model = create_classifier("pvt_v2_b0", pretrained=pretrained)
        torch.testing.assert_close(model.head.weight.detach(), published_pvt["head.weight"])
    assert not caplog.records
    backbone = create_backbone("pvt_v2_b0", pretrained=True, in_chans=1, out_indices=(0, 2))
    assert backbone.stages[0].downsample.proj.weight.shape[1] == 1
    create_classifier("pvt_v2_b0", pretrained=True, num_classes=7)
    assert "no head for 7 classes" in caplog.text


def test_foreign_checkpoint_needs_the_models_name(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    state_dict = create_classifier("pvt_v2_b0", num_classes=3).state_dict()
    file = save_state_dict(convert_state_dict(state_dict, to="official"), tmp_path / "theirs.pth")
    picture = folder / "pictures" / "a.png"
    printed = out(capsys, "predict", file, picture, "--model", "PVTv2-B0", "--device", "cpu")
    assert {line.split("%")[1].strip() for line in printed.splitlines()[1:]} == {"class 0", "class 1", "class 2"}
    assert "--model" in error(capsys, "predict", file, picture)


def test_a_file_is_read_and_translated_once(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def counted(module: ModuleType, name: str) -> None:
        called = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: [calls.append(name), called(*arguments)][1])

    counted(files, "read_content")
    counted(convert, "recognise")
    opened = open_model(str(folder / "tiny.safetensors"))
    _ = opened.classifier(), opened.backbone()
    command = ["convert", folder / "foreign.pth", tmp_path / "out.pth", "--to", "timm", "--model", "swin_tiny"]
    assert "stages" in error(capsys, *command)  # another model's, which is found when it is loaded
    assert calls == ["read_content", "recognise"] * 2


def test_a_position_embedding_of_tokens_has_the_described_grid(tmp_path: Path) -> None:
    model = create_classifier("swin_tiny", num_classes=6, ape_size=(8, 2), **TINY)
    torch.nn.init.normal_(model.backbone.absolute_pos_embed)
    official = convert_state_dict(model.state_dict(), to="official")
    metadata = tiny_metadata(overrides={**TINY, "ape_size": [8, 2]})
    file = save_state_dict(official, tmp_path / "oblong.safetensors", metadata)
    loaded = open_model(str(file)).classifier()
    torch.testing.assert_close(loaded.backbone.absolute_pos_embed, model.backbone.absolute_pos_embed, rtol=0, atol=0)


def test_subprocess_is_the_same_command(folder: Path) -> None:
    command = [sys.executable, "-m", "hvt_backbones", "predict", "--device", "cpu", "--json"]
    arguments = [folder / "tiny.safetensors", folder / "pictures" / "a.png"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["predictions"][0]["top"]) == 5
    failed = subprocess.run([*command, "swim_tiny", arguments[1]], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "swin_tiny" in failed.stderr


# ---- features


def test_output_that_nobody_reads_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hvt_backbones", "models"]
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
        assert (done.returncode, done.stderr) == (141, "")
    os.close(write)


def test_features_are_the_backbones_maps(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "maps.safetensors"
    arguments = ["features", folder / "tiny.safetensors", folder / "pictures", "--output", file, "--device", "cpu"]
    printed = out(capsys, *arguments, "--size", 48, 64)
    maps = read_weights(file).tensors
    assert {name: tuple(stage.shape) for name, stage in maps.items()} == {
        "stage0": (3, 16, 12, 16),
        "stage1": (3, 32, 6, 8),
    }
    assert "(3, 32, 6, 8)" in printed
    images = json.loads(read_weights(file).metadata["images"])
    assert [Path(name).name for name in images] == ["a.png", "b.jpg", "c.GIF"]
    backbone = create_backbone("swin_tiny", pretrained=folder / "tiny.safetensors", **TINY).eval()
    picture = read_image(folder / "pictures" / "a.png").resize((64, 48), Image.Resampling.BILINEAR)
    tensor = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = backbone((tensor - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))[None] / 0.2)
    torch.testing.assert_close(maps["stage1"][:1], expected[1])


def test_features_as_npz_without_weights(folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file, picture = tmp_path / "maps.npz", folder / "pictures" / "a.png"
    options = ["--random-weights", "--stages", "1", "3", "--size", "64", "--device", "cpu"]
    out(capsys, "features", "pvt_v2_b0", picture, "--output", file, *options)
    with numpy.load(file) as maps:
        assert maps["stage1"].shape == (1, 64, 8, 8)
        assert maps["stage3"].shape == (1, 256, 2, 2)
        assert json.loads(str(maps["images"])) == [str(picture)]


# ---- convert, doctor


@pytest.mark.parametrize("layout", ["official", "timm", "mmpretrain", "torchvision", "huggingface"])
def test_convert_there_and_back(layout: str, folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    there, back = tmp_path / "there.pth", tmp_path / "made" / "back.safetensors"
    assert layout in out(capsys, "convert", folder / "tiny.safetensors", there, "--to", layout)
    out(capsys, "convert", there, back, "--to", "hvt", "--layout", layout)
    original, again = read_weights(folder / "tiny.safetensors").tensors, read_weights(back).tensors
    assert original.keys() == again.keys()
    for key in original:
        torch.testing.assert_close(again[key], original[key], rtol=0, atol=0)
    assert read_weights(back).metadata == tiny_metadata()  # so that it predicts without --model


def test_convert_checks_the_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = save_state_dict(create_classifier("pvt_v2_b0").state_dict(), tmp_path / "b0.pth")
    out(capsys, "convert", file, tmp_path / "ours.safetensors", "--to", "timm", "--model", "pvt_v2_b0")
    assert read_weights(tmp_path / "ours.safetensors").metadata == {"hvt.model": "pvt_v2_b0"}
    assert "stages" in error(capsys, "convert", file, tmp_path / "no.pth", "--to", "timm", "--model", "pvt_v2_b1")
    assert not (tmp_path / "no.pth").exists()


def test_doctor_says_what_is_there_and_what_is_missing(capsys: pytest.CaptureFixture) -> None:
    text = out(capsys, "doctor")
    findings = json.loads(out(capsys, "doctor", "--json"))
    assert findings["packages"]["torch"]["version"].startswith(torch.__version__.split("+")[0])
    assert findings["devices"][0]["device"] == "cpu"
    for name, package in findings["packages"].items():
        assert name in text
        assert (package["version"] is None) == (package["install"] is not None)
        if package["install"]:
            assert f"missing ({package['for']}): {package['install']}" in text


# ---- bad input


def error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture
def bad(folder: Path, tmp_path: Path) -> dict[str, str]:
    """Words of the bad commands -> paths, and files that are no good."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.png").touch()
    good = (folder / "pictures" / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    five = create_classifier("swin_tiny", num_classes=2, in_chans=5, **TINY)
    metadata = tiny_metadata(input_size=[5, 32, 32], mean=[0.5] * 5, std=[0.5] * 5, class_names=["no", "yes"])
    save_state_dict(five.state_dict(), tmp_path / "five.safetensors", metadata)
    headless = {key: text for key, text in metadata.items() if key != "hvt.class_names"}
    save_state_dict(five.backbone.state_dict(), tmp_path / "headless.safetensors", headless)
    save_state_dict(five.state_dict(), tmp_path / "garbled.safetensors", tiny_metadata(overrides="{depths"))
    save_state_dict(five.state_dict(), tmp_path / "short.safetensors", metadata | {"hvt.mean": "[0.5]"})
    save_state_dict(five.state_dict(), tmp_path / "names.safetensors", tiny_metadata())
    written = [path.name for path in tmp_path.iterdir()]
    paths = {name: str(tmp_path / name) for name in (*written, "maps.npz", "out.pth", "missing.png", "missing.pth")}
    return paths | {
        "TINY": str(folder / "tiny.safetensors"),
        "FOREIGN": str(folder / "foreign.pth"),
        "PICTURE": str(folder / "pictures" / "a.png"),
        "FOLDER": str(folder),
        "IN_A_FILE": f"{tmp_path}/zero.png/out.pth",
    }


BAD = {
    "no command": ("", "COMMAND"),
    "unknown command": ("prdict", "predict"),
    "unknown option": ("models --mrkdown", "--mrkdown"),
    "no such models": ("models resnet*", "no model matches 'resnet*'"),
    "no such family": ("models --family resnet", "twins_svt"),
    "unknown model": ("predict swin_tinny PICTURE", "swin_tiny"),
    "model of clips": ("predict video_swin_tiny PICTURE", "takes clips, not pictures"),
    "features of clips": ("features swin3d_t PICTURE --output maps.npz --random-weights", "takes clips, not pictures"),
    "missing checkpoint": ("predict missing.pth PICTURE", "missing.pth does not exist"),
    "missing picture": ("predict TINY missing.png", "missing.png does not exist"),
    "empty folder": ("predict TINY empty", "holds no pictures"),
    "zero-byte picture": ("predict TINY zero.png --on-error fail", "zero bytes"),
    "truncated picture": ("predict TINY PICTURE cut.png --on-error fail", "cannot be read"),
    "garbled description": ("predict garbled.safetensors PICTURE", "hvt.overrides"),
    "description of other channels": ("predict short.safetensors PICTURE", "hvt.mean has 1 numbers"),
    "description of other classes": ("predict names.safetensors PICTURE", "6 class names for 2 classes"),
    "checkpoint of an unsaid model": ("predict FOREIGN PICTURE", "add --model NAME"),
    "checkpoint of another family": ("predict FOREIGN PICTURE --model pvt_v2_b0", "of the family swin"),
    "checkpoint without a head": ("predict headless.safetensors PICTURE", "hvt features"),
    "model of a model": ("predict pvt_v2_b0 PICTURE --model pvt_v2_b1", "--model"),
    "five channels": ("predict five.safetensors PICTURE", "5 channels"),
    "unknown device": ("predict TINY PICTURE --device tpu", "auto, cpu, cuda, npu"),
    "no classes": ("predict TINY PICTURE --top-k 0", "--top-k"),
    "features to a picture": ("features TINY PICTURE --output missing.png", ".npz"),
    "features of no stage": ("features TINY PICTURE --output maps.npz --stages 2", "0 to 1"),
    "features of a bad size": ("features TINY PICTURE --output maps.npz --size 32 32 32", "--size"),
    "features of less than a patch": ("features TINY PICTURE --output maps.npz --size 3", "smaller than one"),
    "random features of a file": ("features TINY PICTURE --output maps.npz --random-weights", "--random-weights"),
    "unknown target layout": ("convert TINY out.pth --to keras", "official"),
    "wrong source layout": ("convert TINY out.pth --to timm --layout mmdet", "tiny.safetensors: the keys are not in"),
    "convert a picture": ("convert PICTURE out.pth --to timm", "a.png"),
    "convert onto itself": ("convert TINY TINY --to timm", "another name"),
    "convert to a folder": ("convert TINY FOLDER --to timm", "is a folder"),
    "convert to an unknown suffix": ("convert TINY missing.png --to timm", ".safetensors"),
    "convert to below a file": ("convert TINY IN_A_FILE --to timm", "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, bad: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    command, words = BAD[case]
    before = sorted(Path(bad["empty"]).parent.rglob("*"))
    tiny = Path(bad["TINY"]).read_bytes()
    assert words in error(capsys, *(bad.get(word, word) for word in command.split()))
    assert sorted(Path(bad["empty"]).parent.rglob("*")) == before
    assert Path(bad["TINY"]).read_bytes() == tiny


def test_preprocessing_of_published_weights() -> None:
    assert data_config("swin_base_384").crop_pct == 1.0
    torchvision = data_config("swin_t", "torchvision_in1k")
    assert (torchvision.input_size, torchvision.crop_pct) == ((3, 224, 224), 224 / 232)
    assert data_config("swinv2_base_window12_192.in22k").input_size == (3, 192, 192)
    assert data_config("swinv2_giant").input_size == (3, 192, 192)  # of which there are none


def test_a_path_that_cannot_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = tmp_path / ("a" * 300)
    assert main(["features", "pvt_v2_b0", str(long / "x.png"), "--random-weights", "--output", "maps.npz"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "File name too long" in error


def test_an_empty_path_is_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["features", "pvt_v2_b0", "", "--random-weights", "--output", "maps.npz"]) == 2
    assert "path is empty" in capsys.readouterr().err


def test_predictions_and_features_read_on_past_what_cannot_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sound, broken = folder / "pictures" / "a.png", tmp_path / "broken.png"
    broken.write_bytes(sound.read_bytes()[:60])
    model = str(folder / "tiny.safetensors")
    assert main(["predict", model, str(broken), str(sound), "--json"]) == 1
    said = capsys.readouterr()
    assert [found["image"] for found in json.loads(said.out)["predictions"]] == [str(sound)]
    assert said.err.splitlines()[-1] == "1 of 2 files were left out"
    assert said.err.startswith(f"error: picture {broken} cannot be read")
    output = tmp_path / "maps.npz"
    assert main(["features", model, str(sound), str(broken), "--output", str(output)]) == 1
    assert json.loads(str(numpy.load(output)["images"])) == [str(sound)]
    assert main(["features", model, str(broken), "--output", str(tmp_path / "none.npz")]) == 1
    assert not (tmp_path / "none.npz").exists()
