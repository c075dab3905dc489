"""`hvt transfer-report`: the model of each window against one built by hand, and every bad input in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from hvt_backbones import create_classifier, load_weights
from hvt_backbones.cli import main
from hvt_backbones.images import read_image
from hvt_backbones.model_file import metadata_of, open_model
from hvt_backbones.transfer import in_windows
from hvt_backbones.weights.files import save_state_dict
from hvt_backbones.weights.published import Preprocessing

TINY = {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
CLASSES = ["cat", "dog", "newt"]
PREPARED = Preprocessing(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.8)
NAMES = {"v1": "swin_tiny", "v2": "swinv2_tiny_window8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of both versions, and eight pictures of two of their three classes."""
    root = tmp_path_factory.mktemp("transfer")
    torch.manual_seed(0)
    for file, name in NAMES.items():
        model = create_classifier(name, num_classes=3, **TINY)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        save_state_dict(
            model.state_dict(), root / f"{file}.safetensors", metadata_of(name, TINY, PREPARED, class_names=CLASSES)
        )
    pvt = create_classifier("pvt_v2_b0", num_classes=3)
    save_state_dict(
        pvt.state_dict(), root / "pvt.safetensors", metadata_of("pvt_v2_b0", {}, PREPARED, class_names=CLASSES)
    )
    backbone = create_classifier("swin_tiny", num_classes=0, **TINY)
    save_state_dict(backbone.state_dict(), root / "headless.safetensors", metadata_of("swin_tiny", TINY, PREPARED))
    save_state_dict(model.state_dict(), root / "nameless.pth")
    uneven = {**TINY, "window_size": [[8, 8], [3, 3]]}
    model = create_classifier("swin_tiny", num_classes=3, **uneven)
    save_state_dict(
        model.state_dict(), root / "uneven.safetensors", metadata_of("swin_tiny", uneven, PREPARED, class_names=CLASSES)
    )
    pixels = numpy.random.default_rng(0).integers(0, 256, (8, 40, 50, 3), dtype=numpy.uint8)
    for number, picture in enumerate(pixels):
        path = root / "data" / ("newt" if number % 2 else "cat") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    for name in ("empty", "unlike/cat", "unlike/shrew", "hollow/cat", "loose/cat"):
        (root / name).mkdir(parents=True)
    for path in ("unlike/cat/0.png", "unlike/shrew/0.png", "loose/0.png", "loose/cat/0.png"):
        Image.fromarray(pixels[0]).save(root / path)
    return root


def by_hand(folder: Path, file: str, window: int) -> tuple[float, float]:
    """Top-1 and loss of the model with this window, its pictures prepared for it."""
    arguments = {**TINY, "window_size": window, **({"pretrained_window_size": 4} if file == "v2" else {})}
    model = create_classifier(NAMES[file], num_classes=3, **arguments).eval()
    load_weights(model, folder / f"{file}.safetensors")
    side = 8 * window
    transform = Preprocessing(**{**vars(PREPARED), "input_size": (3, side, side)}).transform()
    paths = sorted((folder / "data").rglob("*.png"))
    targets = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    with torch.no_grad():
        logits = model(torch.stack([transform(read_image(path)) for path in paths]))
    return 100 * (logits.argmax(1) == targets).float().mean().item(), cross_entropy(logits, targets).item()


@pytest.mark.parametrize("file", NAMES)
def test_each_window_is_the_model_built_for_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, file: str
) -> None:
    arguments = ["transfer-report", folder / f"{file}.safetensors", "--windows", "6,8,6", "--data", folder / "data"]
    assert main([str(one) for one in (*arguments, "--device", "cpu", "--output", tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads((tmp_path / "new" / "transfer.json").read_text())
    assert {key: found[key] for key in ("model", "own_window", "pictures")} == {
        "model": NAMES[file], "own_window": 4, "pictures": 8,
    }  # fmt: skip
    assert [row["window"] for row in found["windows"]] == [4, 6, 8]
    assert [row["image_size"] for row in found["windows"]] == [[32, 32], [48, 48], [64, 64]]
    expected = [by_hand(folder, file, window) for window in (4, 6, 8)]
    losses = [loss for _, loss in expected]
    assert min(abs(one - other) / one for one in losses for other in losses if one is not other) > 1e-3
    for row, (top1, loss) in zip(found["windows"], expected, strict=True):
        assert row["top1"] == pytest.approx(top1)
        assert row["drop"] == pytest.approx(expected[0][0] - top1)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
    table = [line.split() for line in printed.out.splitlines()[2:5]]
    assert table == [
        [str(row["window"]), "x".join(map(str, row["image_size"])), *(f"{row[key]:.2f}" for key in ("top1", "drop")),
         f"{row['loss']:.4f}"] for row in found["windows"]
    ]  # fmt: skip
    with Image.open(tmp_path / "new" / "transfer.png") as plot:
        assert plot.size > (400, 300)
        assert len(plot.convert("RGB").getcolors(2**20) or ()) > 10
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["transfer.json", "transfer.png"]


def test_windows_smaller_than_the_first_stages_scale_too(tmp_path: Path) -> None:
    """As of swinv2_*_window16, whose last map at 256 has 8 tokens a side."""
    overrides = {**TINY, "window_size": 8}
    model = create_classifier("swinv2_tiny_window8", num_classes=3, **overrides)
    file = tmp_path / "model.safetensors"
    save_state_dict(
        model.state_dict(), file, metadata_of("swinv2_tiny_window8", overrides, PREPARED, class_names=CLASSES)
    )
    larger = in_windows(open_model(str(file)), [12])[12]
    assert larger.preprocessing.input_size == (3, 48, 48)
    backbone = larger.classifier().backbone
    assert backbone.window_size == ((12, 12), (6, 6))
    assert backbone.pretrained_window_size == ((8, 8), (4, 4))


BAD: dict[str, tuple[list[str], str]] = {
    "a word for a window": (["v1.safetensors", "--windows", "8,wide"], "'wide' is not a whole number from 1"),
    "no window": (["v1.safetensors", "--windows", "0"], "'0' is not a whole number from 1"),
    "a window that the maps cannot have": (
        ["uneven.safetensors", "--windows", "16,12"],
        "window 12: .* multiples of 8 alone",
    ),
    "another family": (["pvt.safetensors"], "is a pvt_v2_b0, which has no windows to change"),
    "no head": (["headless.safetensors"], "no classifier head"),
    "no model": (["nameless.pth"], "add --model NAME"),
    "no checkpoint": (["none.safetensors"], "does not exist"),
    "no folder of data": (["v1.safetensors", "--data", "none"], "folder .*none does not exist"),
    "an empty folder": (["v1.safetensors", "--data", "empty"], "has no sub-folders; expected one"),
    "a class without pictures": (["v1.safetensors", "--data", "hollow"], "hollow/cat holds no pictures"),
    "pictures in no class": (["v1.safetensors", "--data", "loose"], "has pictures that lie in no class"),
    "another class": (["v1.safetensors", "--data", "unlike"], r"shrew only in the data, and unknown to .*v1"),
    "an output that is a file": (["v1.safetensors", "--output", "v2.safetensors"], "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    given = {"--windows": "8", "--data": "data", **dict(zip(arguments[1::2], arguments[2::2], strict=True))}
    paths = {key: str(folder / value) if key != "--windows" else value for key, value in given.items()}
    paths.setdefault("--output", str(tmp_path / "report"))
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    options = [word for pair in paths.items() for word in pair]
    assert main(["transfer-report", str(folder / arguments[0]), *options, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not any(tmp_path.iterdir())
    assert {path: path.stat().st_size for path in folder.rglob("*")} == before


def test_without_matplotlib(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data, output = folder / "data", tmp_path / "report"
    arguments = ["transfer-report", folder / "v1.safetensors", "--windows", "8", "--data", data, "--output", output]
    assert main([str(one) for one in arguments]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not output.exists()
