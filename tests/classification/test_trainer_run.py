"""Whole runs of the trainer: what they learn, what they leave, how they go on, and what they refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.train import train
from classification.trainer import Trainer
from hvt_backbones.model_file import open_model

Run = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]


def newest_state(folder: Path) -> dict:
    return checkpoint.load_state(checkpoint.list_checkpoints(folder)[-1])


# Of all families the gradients are the official ones: two show that the trainer uses them.
# Two stages over 32x32 pictures, patches of four pixels, a few thousand parameters.
FAMILIES = {
    "SwinTransformer": ("swin_tiny", {"patch_size": 4, "window_size": 4, "embed_dim": 32, "num_heads": [2, 4]}),
    "PyramidVisionTransformerV2": (
        "pvt_v2_b0", {"embed_dims": [32, 64], "num_heads": [2, 4], "mlp_ratios": [4, 4], "sr_ratios": [2, 1]}
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("class_name", FAMILIES)
def test_it_learns_the_digits(class_name: str, digits: Path, tmp_path: Path) -> None:
    name, overrides = FAMILIES[class_name]
    epochs = "8" if name.startswith("swin") else "4"  # the others' convolutions know that neighbours matter
    config = parse_command_line(
        ["digits", "--model.name", name, "--data-dir", str(digits), "--output-dir", str(tmp_path), "--epochs", epochs,
         "--model.overrides", json.dumps(overrides | {"depths": [2, 2], "drop_path_rate": 0.0}), "--lr", "3e-3",
         "--schedule.warmup_epochs", "1", "--augmentation.auto_augment", "null", "--augmentation.scale", "[0.9, 1.0]",
         "--data.workers", "0", "--device", "cpu"]
    )  # fmt: skip
    trainer = Trainer(config)
    assert type(trainer.learner.model.backbone).__name__ == class_name
    metrics = trainer.run()
    rows = list(csv.DictReader((tmp_path / checkpoint.LOG).open()))
    assert metrics["best"]["top1"] > 60
    assert float(rows[-1]["train_loss"]) < 0.75 * float(rows[0]["train_loss"])
    assert open_model(str(tmp_path / checkpoint.BEST_WEIGHTS)).name == name


def test_a_run_leaves_everything_and_nothing_else(quick_run: Run, tmp_path: Path) -> None:
    status, _ = quick_run("--train.ema_decay", "0", "--output.tensorboard", "false")
    assert status == 0
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == sorted(checkpoint.RUN_FILES)
    rows = list(csv.DictReader((folder / checkpoint.LOG).open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(row["val_images"] == "6" for row in rows)
    metrics = json.loads((folder / checkpoint.METRICS).read_text())
    assert metrics["best"]["top1"] == max(float(row["top1"]) for row in rows)
    with Image.open(folder / checkpoint.CURVES) as picture:
        assert picture.width > 1000
    settings = yaml.safe_load((folder / checkpoint.CONFIG).read_text())
    assert (settings["train"]["epochs"], settings["output"]["dir"]) == (2, str(folder))

    state = newest_state(folder)
    weights = load_file(folder / checkpoint.LAST_WEIGHTS)
    assert weights.keys() == state["model"].keys()
    assert all(torch.equal(weights[key], state["model"][key]) for key in weights)


def test_weights_describe_themselves(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    path = tmp_path / "run" / checkpoint.BEST_WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["hvt.model"] == "swinv2_tiny_window8"
    assert json.loads(metadata["hvt.overrides"])["embed_dim"] == 16
    assert json.loads(metadata["hvt.class_names"]) == ["bright", "dark"]
    assert (metadata["hvt.num_classes"], json.loads(metadata["hvt.input_size"])) == ("2", [3, 32, 32])
    assert (json.loads(metadata["hvt.mean"]), json.loads(metadata["hvt.std"])) == ([0.0] * 3, [0.5] * 3)
    assert (metadata["hvt.interpolation"], float(metadata["hvt.crop_pct"])) == ("bicubic", 1.0)
    model_file = open_model(str(path))
    model = model_file.classifier()
    for key, value in load_file(path).items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_folder_with_a_run_is_refused_unless_told(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    folder = tmp_path / "run"

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = contents()
    status, error = quick_run("--seed", "1")
    assert status == 2
    assert "already holds a run" in error
    assert contents() == before
    assert quick_run("--seed", "1", "--overwrite")[0] == 0
    weights = folder / checkpoint.LAST_WEIGHTS
    assert weights.read_bytes() != before[weights]


def fault_unreadable(data: Path) -> tuple[tuple[str, ...], str]:
    (data / "train" / "dark" / "5.png").write_bytes(b"not a picture")
    return (), "dark/5.png cannot be read"


def fault_batch_too_large(data: Path) -> tuple[tuple[str, ...], str]:
    return ("--batch-size", "16"), "data.batch_size: 12 training pictures"


def fault_output_is_a_file(data: Path) -> tuple[tuple[str, ...], str]:
    (data.parent / "taken").write_text("mine")
    return ("--output-dir", str(data.parent / "taken")), "taken is a file"


def fault_output_below_a_file(data: Path) -> tuple[tuple[str, ...], str]:
    (data.parent / "taken").write_text("mine")
    return ("--output-dir", str(data.parent / "taken" / "run")), "cannot write to"


def fault_resume_from_pictures(data: Path) -> tuple[tuple[str, ...], str]:
    return ("--resume", str(data)), "is not a checkpoint of this trainer"


def fault_damaged_state(data: Path) -> tuple[tuple[str, ...], str]:
    folder = data / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / checkpoint.STATE).write_bytes(b"PK\x03\x04 cut off")
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": {"state.pt": {"bytes": 1000, "sha256": "0"}}}))
    return ("--resume", str(folder)), "step_00000003 is damaged (state.pt has 12 bytes instead of 1000)"


FAULTS = {name.removeprefix("fault_"): fault for name, fault in list(globals().items()) if name.startswith("fault_")}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_bad_input_is_one_line_and_leaves_nothing(
    fault: Callable[[Path], tuple[tuple[str, ...], str]], small_data: Path, quick_run: Run, tmp_path: Path
) -> None:
    options, message = fault(small_data)
    before = sorted(tmp_path.rglob("*"))
    status, error = quick_run(*options)
    assert status == 2
    assert error.splitlines()[-1].startswith("error: ")
    assert (error.count("error: "), error.count("\n")) == (1, 1)
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unreadable_held_out_picture_ends_the_epoch_but_loses_nothing(
    quick_run: Run, small_data: Path, tmp_path: Path
) -> None:
    picture = small_data / "val" / "dark" / "2.png"
    contents = picture.read_bytes()
    picture.write_bytes(b"not a picture")
    status, error = quick_run()
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert "dark/2.png cannot be read" in error
    assert newest_state(tmp_path / "run")["step"] == 3
    picture.write_bytes(contents)
    assert quick_run("--resume", "auto")[0] == 0


def test_a_state_of_another_model_is_refused(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    state = str(checkpoint.list_checkpoints(tmp_path / "run")[-1])
    status, error = quick_run(
        "--resume", state, "--model.overrides.embed_dim", "24", "--output-dir", str(tmp_path / "other")
    )
    assert status == 2
    assert "of another model: overrides" in error
    assert not (tmp_path / "other").exists()


def test_mixing_and_erasing_run(quick_run: Run) -> None:
    status, _ = quick_run(
        "--augmentation.mixup", "0.8", "--augmentation.cutmix", "1.0", "--augmentation.random_erasing", "1.0",
        "--train.accumulation", "2", "--train.amp", "bf16", "--optimizer.layer_decay", "0.8",
        "--model.grad_checkpointing", "--model.max_logits", "500", "--model.freeze_stages", "1",
    )  # fmt: skip
    assert status == 0


def test_the_rate_follows_the_global_batch(quick_run: Run, tmp_path: Path) -> None:
    options = ("--lr", "8e-3", "--optimizer.lr_batch_size", "16", "--schedule.name", "constant", "--epochs", "1")
    assert quick_run(*options)[0] == 0
    row = next(csv.DictReader((tmp_path / "run" / checkpoint.LOG).open()))
    assert float(row["lr"]) == pytest.approx(8e-3 * 4 / 16)


def test_train_returns_what_it_wrote(small_data: Path, tmp_path: Path, quick: tuple[str, ...]) -> None:
    config = parse_command_line(
        ["digits", *quick, "--data-dir", str(small_data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    )
    assert train(config) == json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())


def test_a_run_resumed_in_another_folder_has_its_own_best(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    state = str(checkpoint.list_checkpoints(tmp_path / "run")[-1])
    options = (
        "--resume",
        state,
        "--output-dir",
        str(tmp_path / "on"),
        "--epochs",
        "3",
        "--output.tensorboard",
        "false",
    )
    status, error = quick_run(*options)
    assert status == 2
    assert "train.epochs 2 there, 3 here" in error
    assert quick_run(*options, "--allow-changes")[0] == 0
    assert sorted(path.name for path in (tmp_path / "on").iterdir()) == sorted(checkpoint.RUN_FILES)
    best = json.loads((tmp_path / "on" / checkpoint.METRICS).read_text())["best"]["epoch"]
    assert best in (2, 3)  # the second epoch was trained there, and evaluated here
    with safe_open(tmp_path / "on" / checkpoint.BEST_WEIGHTS, "pt") as file:
        assert file.metadata()["hvt.epoch"] == str(best)
