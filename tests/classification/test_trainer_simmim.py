"""Pre-training by SimMIM through the trainer, and what comes after it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.objective import OF_MASKS
from classification.trainer import Trainer
from classification.validate import main as validate
from hvt_backbones.cli import main as hvt
from hvt_backbones.model_file import Masking, open_model
from hvt_backbones.predict import image_batches
from hvt_backbones.simmim import random_mask
from tests.classification.processes import in_processes, trained

from .conftest import QUICK
from .saved_runs import Run

SIMMIM = ("--train.task", "simmim", "--simmim.mask_patch_size", "8")


def held_out_loss(model: torch.nn.Module, folder: Path, preprocessing) -> float:
    """Of every picture by itself, with the mask of its place in the data set."""
    losses = []
    for index, path in enumerate(sorted((folder / "val").rglob("*.png"))):
        (image,) = image_batches([path], preprocessing, torch.device("cpu"))
        generator = torch.Generator().manual_seed(index ^ OF_MASKS)
        mask = random_mask(32, 32, mask_patch_size=8, generator=generator)[None]
        with torch.no_grad():
            losses.append(model.loss(image, model(image, mask), mask).item())
    return float(np.mean(losses))


def test_it_learns_to_paint_and_a_classifier_begins_from_there(
    quick_run: Run, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    norm = ("--simmim.norm_target", "9")
    assert quick_run(*SIMMIM, *norm, "--epochs", "4", "--simmim.picture_epochs", "3") == (0, "")
    folder = tmp_path / "run"
    rows = list(csv.DictReader((folder / checkpoint.LOG).open()))
    assert "top1" not in rows[0]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    best = min(rows, key=lambda row: float(row["val_loss"]))
    metrics = json.loads((folder / checkpoint.METRICS).read_text())
    assert metrics["best"] == {
        "epoch": int(best["epoch"]), "val_loss": float(best["val_loss"]), "val_images": 6,
    }  # fmt: skip
    text = (folder / checkpoint.REPORT).read_text()
    assert "top-1" not in text
    assert f"best held-out loss</dt><dd>{float(best['val_loss']):.4f}" in text
    assert "what is painted, in epoch 4" in text

    opened = open_model(str(folder / checkpoint.BEST_WEIGHTS))
    assert opened.masking == Masking(0.6, 8, 9)
    model = opened.simmim()
    assert held_out_loss(model, small_data, opened.preprocessing) == pytest.approx(float(best["val_loss"]), rel=1e-5)
    drawn = sorted((folder / checkpoint.RECONSTRUCTIONS).iterdir())
    assert [path.name for path in drawn] == ["epoch_1.png", "epoch_3.png", "epoch_4.png"]
    sheet = Image.open(drawn[-1])
    assert sheet.size == (3 * 32 + 2 * 4, 6 * 32 + 5 * 4)  # every held-out picture
    first = Image.open(next((small_data / "val" / "bright").iterdir())).resize((32, 32))
    assert np.abs(np.asarray(sheet)[:32, :32].mean() - np.asarray(first).mean()) < 2

    # further on, from its weights
    assert validate([str(folder), "--data-dir", str(small_data)]) == 2
    assert "has no classifier head, so it predicts nothing" in capsys.readouterr().err
    capsys.readouterr()
    picture, out = str(small_data / "val" / "dark"), tmp_path / "painted.png"
    assert hvt(["reconstruct", str(folder / checkpoint.BEST_WEIGHTS), picture, "--output", str(out)]) == 0
    assert f"wrote {out}: 3 rows" in capsys.readouterr().out
    assert Image.open(out).size == (104, 104)
    options = [
        "digits", *QUICK, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "tuned"),
        "--model.pretrained", str(folder / checkpoint.BEST_WEIGHTS),
    ]  # fmt: skip
    begun = Trainer(parse_command_line(options)).learner.model.state_dict()
    given = load_file(folder / checkpoint.BEST_WEIGHTS)
    kept = [key for key in begun if not key.startswith("head.")]
    assert set(given) - set(kept) == {"mask_token", "decoder.weight", "decoder.bias"}
    assert all(torch.equal(begun[key], given[key]) for key in kept)


def test_what_is_painted_replaces_what_is_hidden_alone(quick_run: Run, small_data: Path, tmp_path: Path) -> None:
    assert quick_run(*SIMMIM, "--epochs", "1") == (0, "")
    sheets = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "sheet.png"
        source = str(tmp_path / "run" / checkpoint.LAST_WEIGHTS)
        hvt(["reconstruct", source, str(small_data / "val" / "bright"), "--output", str(out), "--seed", seed])
        sheets.append(np.asarray(Image.open(out)).astype(int))
    first, again, other = sheets
    assert (first == again).all()
    assert (first != other).any()
    whole, seen, painted = first[:32, :32], first[:32, 36:68], first[:32, 72:]
    hidden = (seen == 128).all(-1)
    assert hidden.mean() == 10 / 16  # squares, at least 0.6
    assert (seen[~hidden] == whole[~hidden]).all()
    assert (painted[~hidden] == whole[~hidden]).all()
    assert (painted[hidden] != whole[hidden]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--simmim.mask_ratio", "1"], "simmim.mask_ratio: must be more than 0 and less than 1, got 1.0"),
        (["--simmim.mask_ratio", "0"], "simmim.mask_ratio: must be more than 0"),
        (["--simmim.mask_patch_size", "12"], "simmim.mask_patch_size: mask_patch_size 12 does not divide an image of"),
        (["--simmim.norm_target", "4"], "simmim.norm_target: 4 has no middle"),
        (["--data.input_size", "[3, 36, 36]"], "SimMIM needs multiples of 8"),
        (["--model.name", "pvt_v2_b0"], "train.task: simmim is for Swin and SwinV2, not for pvt_v2_b0"),
        (["--augmentation.mixup", "0.8"], "augmentation.mixup: is for classes"),
        (["--model.freeze_stages", "1"], "model.freeze_stages: is for classes"),
    ],
)
def test_what_cannot_be_painted_is_one_line(quick_run: Run, options: list[str], message: str, tmp_path: Path) -> None:
    status, said = quick_run(*SIMMIM, *options)
    assert (status, said.count("\n")) == (2, 1)
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_another_task(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run(*SIMMIM, "--epochs", "1", "--output.diagnose_steps", "1")[0] == 0
    status, said = quick_run("--resume", "auto", "--output.allow_changes", "true")
    assert status == 2
    assert "the checkpoint is of another model" in said


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "processes"), [("ddp", 2), ("fsdp2", 2)])
def test_many_processes_paint_as_one(mode: str, processes: int, small_data: Path, tmp_path: Path) -> None:
    def run(mode: str, processes: int) -> list:
        return in_processes(
            processes, trained, "digits", *QUICK, *SIMMIM, "--data-dir", str(small_data), "--parallel.mode", mode,
            "--batch-size", str(4 // processes), "--optimizer.eps", "1e-5",
            "--output-dir", str(tmp_path / mode / str(processes)),
        )  # fmt: skip

    (alone,), together = run("ddp", 1), run(mode, processes)
    for curve in together:
        np.testing.assert_allclose(curve.losses, alone.losses, rtol=1e-5)
        np.testing.assert_allclose(curve.norms, alone.norms, rtol=1e-5)
        assert curve.metrics["best"]["val_loss"] == pytest.approx(alone.metrics["best"]["val_loss"], rel=1e-5)
        assert curve.metrics["best"]["val_images"] == 6
