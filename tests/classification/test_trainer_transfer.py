"""From the trainer's weights into other windows: what its files say of a SwinV2, and `hvt transfer-report` of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from classification.config import DataConfig, ModelConfig
from classification.state import build_model, describe_model
from classification.train import main
from hvt_backbones.cli import main as hvt
from hvt_backbones.model_file import open_model
from hvt_backbones.weights.files import save_state_dict

TINY = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}


def test_the_first_window_stays_through_a_chain(tmp_path: Path) -> None:
    """Trained in 4, fine-tuned in 6, then in 8: the trainer's files tell 4."""
    file: str | bool = False
    for window in (4, 6, 8):
        overrides = {**TINY, "window_size": window}
        settings = ModelConfig(name="swinv2_tiny_window8", pretrained=file and str(file), overrides=overrides)
        model = build_model(settings, 3, 3, None)
        torch.nn.init.normal_(model.head.weight)
        metadata = describe_model(settings, model, DataConfig(input_size=(3, 48, 48)), ["a", "b", "c"], None)
        told = {"pretrained_window_size": [[4, 4], [4, 4]]} if window > 4 else {}
        assert json.loads(metadata["hvt.overrides"]) == {**overrides, **told}
        file = save_state_dict(model.state_dict(), tmp_path / f"{window}.safetensors", metadata)
        images = torch.randn(1, 3, 48, 48)
        torch.testing.assert_close(open_model(str(file)).classifier()(images), model.eval()(images))


def test_the_trainer_says_nothing_that_the_arguments_say() -> None:
    """A run from before is resumed by the same description."""
    settings = ModelConfig(
        name="swinv2_base_window12to16_256",
        overrides={"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    )
    metadata = describe_model(settings, build_model(settings, 3, 2, None), DataConfig(), ["a", "b"], None)
    assert json.loads(metadata["hvt.overrides"]) == settings.overrides


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny", "swinv2_tiny_window8"])
def test_trained_fine_tuned_and_reported(
    name: str, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture
) -> None:
    """One epoch of the digits in window 4, one in window 8, and the report on both."""

    def train(folder: Path, window: int, *arguments: str) -> Path:
        options = {
            "model.name": name,
            "model.overrides": {**TINY, "window_size": window},
            "data.input_size": [3, 8 * window, 8 * window],
            "data.dir": digits,
            "data.workers": 0,
            "output.dir": folder,
            "train.epochs": 1,
            "train.device": "cpu",
        }
        assert main(["digits", *(f"--{key}={value}" for key, value in options.items()), *arguments]) == 0
        return folder / "model_best.safetensors"

    first = train(tmp_path / "first", 4)
    second = train(tmp_path / "second", 8, f"--model.pretrained={first}")
    for checkpoint, own, windows in ((first, 4, [4, 8]), (second, 8, [8, 4])):
        folder = tmp_path / f"from_{own}"
        command = ["transfer-report", checkpoint, "--windows", "4,8", "--data", digits / "val", "--output", folder]
        capsys.readouterr()
        assert hvt([*map(str, command), "--device", "cpu"]) == 0
        found = json.loads((folder / "transfer.json").read_text())
        assert found["own_window"] == own
        assert found["pictures"] == 599
        assert [row["window"] for row in found["windows"]] == windows
        assert [row["image_size"] for row in found["windows"]] == [[8 * side, 8 * side] for side in windows]
        best = json.loads((checkpoint.parent / "metrics.json").read_text())["best"]
        assert found["windows"][0]["top1"] == pytest.approx(best["top1"], abs=0.01)
        assert found["windows"][0]["loss"] == pytest.approx(best["val_loss"], rel=1e-3)
        assert f"  {found['windows'][1]['drop']:.2f}  " in capsys.readouterr().out
        assert (folder / "transfer.png").read_bytes().startswith(b"\x89PNG")
