"""Recipes and the command line: what is read, and what each mistake is told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from classification.command_line import FIELDS, RECIPES, build_config, load_recipe, parse_command_line
from classification.train import main
from hvt_backbones import InputError


def test_recipe_is_found_by_name_and_by_path() -> None:
    config = parse_command_line(["digits"])
    assert config == parse_command_line([str(RECIPES / "digits.yaml")])
    assert config.output.dir == "outputs/digits"
    assert config == parse_command_line(["digits", "--output-dir", "null"])


def test_command_line_wins_over_recipe_and_recipe_over_default(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {name: swin_tiny}\ndata: {kind: synthetic}\noptimizer: {lr: 1e-3, weight_decay: 0.1}\n")
    config = parse_command_line([str(recipe), "--optimizer.weight_decay=0.2", "--epochs", "7"])
    assert config.optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as text
    assert (config.optimizer.weight_decay, config.train.epochs, config.optimizer.layer_decay) == (0.2, 7, 1.0)


def test_short_names_and_model_overrides() -> None:
    config = parse_command_line(
        ["digits", "--epochs", "3", "--seed", "5", "--output-dir", "o", "--device", "cpu", "--batch-size", "8",
         "--lr", "1e-2", "--data-dir", "d", "--overwrite", "--model.overrides.embed_dim", "24",
         "--model.overrides.depths=[1, 1]", "--augmentation.auto_augment", "null"]
    )  # fmt: skip
    assert (config.train.epochs, config.train.seed, config.train.device) == (3, 5, "cpu")
    assert (config.output.dir, config.output.overwrite, config.data.dir) == ("o", True, "d")
    assert (config.data.batch_size, config.optimizer.lr, config.augmentation.auto_augment) == (8, 1e-2, None)
    assert config.model.overrides["embed_dim"] == 24
    assert config.model.overrides["depths"] == [1, 1]
    assert config.model.overrides["patch_size"] == load_recipe(RECIPES / "digits.yaml")["model.overrides"]["patch_size"]


def test_config_survives_yaml(tmp_path: Path) -> None:
    config = parse_command_line(["digits", "--augmentation.scale", "[0.5, 0.9]"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert parse_command_line([str(tmp_path / "again.yaml")]) == config
    overrides = {"large": float("inf"), "numbered": {1: [2, 3]}}
    recorded = replace(config, model=replace(config.model, overrides=overrides)).as_dict()
    assert recorded["model"]["overrides"] == overrides
    assert recorded["augmentation"]["scale"] == [0.5, 0.9]


def test_help_lists_every_setting_with_type_and_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, schema in FIELDS.items():
        assert f"--{key}" in text
        assert schema["description"][:20] in text  # argparse breaks the rest at hyphens
    # Python 3.13 names the value once
    assert re.search(r"--optimizer\.lr( V)?, --lr V peak learning rate \[number; default 0\.001\]", text)


MISTAKES = {
    "no recipe": ([], "required: RECIPE"),
    "unknown recipe": (["digit"], "did you mean digits or digits_simmim?"),
    "unknown key": (["digits", "--optimizer.lrr", "1"], "did you mean --optimizer.lr"),
    "key of another section": (["digits", "--train.lr", "1"], "did you mean optimizer.lr?"),
    "stray value": (["digits", "3"], "'3': unexpected value"),
    "no value": (["digits", "--epochs"], "expected one argument"),
    "text for a number": (
        ["digits", "--lr", "fast"],
        "optimizer.lr: expected number, more than 0 and at most 100, got 'fast'",
    ),
    "number for a whole one": (
        ["digits", "--epochs", "2.5"],
        "train.epochs: expected integer, at least 1 and at most 100000, got '2.5'",
    ),
    "truth for a number": (["digits", "--epochs", "true"], "train.epochs: expected integer"),
    "not a number": (["digits", "--lr", "nan"], "optimizer.lr: expected number"),
    "infinite": (["digits", "--lr", "inf"], "optimizer.lr: expected number"),
    "negative": (["digits", "--lr=-1"], "optimizer.lr: must be more than 0 and at most 100, got -1"),
    "zero epochs": (["digits", "--epochs", "0"], "train.epochs: must be at least 1 and at most 100000, got 0"),
    "absurd": (["digits", "--epochs", "1000000000"], "and at most 100000, got 1000000000"),
    "unknown choice": (["digits", "--device", "tpu"], "train.device: expected auto | cpu | cuda | npu, got 'tpu'"),
    "wrong length": (["digits", "--data.input_size", "[32, 32]"], "data.input_size: expected 3 values, got 2"),
    "wrong item": (
        ["digits", "--data.mean", "[a, b, c]"],
        "data.mean: expected list of numbers, at least 0 and at most 1",
    ),
    "channels": (["digits", "--data.input_size", "[1, 32, 32]"], "data.mean: 3 values for 1 channels"),
    "bounds": (["digits", "--augmentation.scale", "[0.9, 0.5]"], "augmentation.scale: the lower bound"),
    "minimum": (["digits", "--lr", "1e-9"], "is above optimizer.lr"),
    "shards of a whole": (["digits", "--output.sharded"], "output.sharded: parallel.mode = ddp has no shards"),
    "odd batch": (["digits", "--augmentation.mixup", "0.8", "--batch-size", "7"], "data.batch_size: mixup"),
    "fp16 on a CPU": (["digits", "--train.amp", "fp16", "--device", "cpu"], "train.amp: fp16"),
    "both": (["digits", "--overwrite", "--resume", "auto"], "output.resume: contradicts output.overwrite"),
    "no data": (["digits", "--data.kind", "imagefolder"], "data.dir: missing"),
    "unknown model": (["digits", "--model.name", "swin_tny"], "unknown model 'swin_tny'"),
    "unknown optimiser": (["digits", "--optimizer.name", "adamv"], "did you mean adam"),
    "unknown policy": (["digits", "--augmentation.auto_augment", "rnad-m9"], "augmentation.auto_augment: timm"),
    "override is no value": (["digits", "--model.overrides.depths", "[1"], "expected a YAML value"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_one_line_and_touches_nothing(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


BROKEN_RECIPES = {
    "not YAML": ("model: {name: [", "is not YAML"),
    "a list": ("- model", "expected sections"),
    "empty": ("", "expected sections"),
    "unknown section": ("modle: {name: swin_tiny}", "did you mean model?"),
    "flat": ("model: swin_tiny", "model: expected settings below it"),
    "unknown setting": ("model: {name: swin_tiny}\ndata: {bach_size: 3}", "did you mean data.batch_size"),
    "no model": ("data: {kind: digits}", "model.name: missing"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_RECIPES.values(), ids=BROKEN_RECIPES.keys())
def test_broken_recipe(text: str, message: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(InputError) as error:
        parse_command_line([str(recipe)])
    assert message in str(error.value)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100)
@given(key=st.sampled_from(sorted(FIELDS)), value=JUNK)
def test_any_value_is_taken_or_refused_by_name(key: str, value: object) -> None:
    """A mutated recipe either still is a valid one or gives an error that names the key."""
    recipe = load_recipe(RECIPES / "digits.yaml") | {"output.dir": "o"}
    section, name = key.split(".")
    try:
        config = build_config(recipe | {key: value})
    except InputError as error:
        message = str(error)
    else:
        taken = getattr(getattr(config, section), name)
        as_given = tuple(value) if isinstance(value, list) else value
        assert taken == as_given or yaml.safe_load(str(value)) == taken
        return
    assert name in message or (key == "model.name" and "model" in message)
    assert "\n" not in message
