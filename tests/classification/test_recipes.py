"""The shipped recipes: what their headers promise, the models that they build, and two steps of each."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from classification import checks
from classification.command_line import RECIPES, load_recipe, parse_command_line
from classification.config import Config
from classification.trainer import Trainer
from hvt_backbones import Classifier, InputError, SimMIM, create_classifier, create_simmim
from hvt_backbones.variants import VARIANTS, Variant, find_variant
from hvt_backbones.weights.files import save_state_dict

NAMES = [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
OURS = ("digits", "digits_simmim", "finetune", "linear_probe")  # no publication behind them
OWN_WEIGHTS = "swinv2_base_simmim_800ep_finetune"  # which begins with what another recipe left: none are published
PUBLISHED = [name for name in NAMES if name not in OURS]
# Stochastic depth as the papers and the authors' configurations state it; the first match counts.
STOCHASTIC_DEPTH = {
    "swinv2_base_simmim*": 0.1, "swin_*simmim_*00ep": 0.0, "swin_base_simmim*": 0.1,
    "swin_tiny_in22k*": 0.1, "swin*in22k*": 0.2, "swin_large*": 0.2, "swinv2_*_window12*": 0.2,
    "swin*_tiny*": 0.2, "swin*_small*": 0.3, "swin*_base*": 0.5,
    "pvt_v2_b[012]*": 0.1, "pvt_v2_b[345]": 0.3,
    "twins_*_small": 0.2, "twins_*_base": 0.3, "twins_*_large": 0.5,
}  # fmt: skip
# Two stages and a few thousand parameters for 32x32 pictures; windows stay as they are where the family allows it.
SHRUNKEN = {
    "swin": {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]},
    "swinv2": {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]},
    "pvt_v2": {"embed_dims": [16, 32], "depths": [1, 2], "num_heads": [1, 2]},
    "twins_pcpvt": {"embed_dims": [16, 32], "depths": [1, 2], "num_heads": [1, 2]},
    "twins_svt": {"embed_dims": [16, 32], "depths": [2, 2], "num_heads": [1, 2], "window_sizes": [4, 4]},
}
GLOBAL_BATCH = 16  # two pictures for each of eight steps of accumulation


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two global batches of two classes to train on, one picture of each held out."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", GLOBAL_BATCH), ("val", 1)):
        for name, level in (("bright", 190), ("dark", 30)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 36), (level + 5 * index, level, level)).save(folder / f"{index}.png")
    return root


def parse(name: str, pictures: Path, *options: str) -> Config:
    return parse_command_line([name, "--data-dir", str(pictures), *options])


@cache  # a second or two each: the real model is built and run
def parse_whole(name: str, pictures: Path) -> tuple[Config, Classifier | SimMIM]:
    """A recipe as it is, and the model on the meta device by which its settings are checked."""
    built: list[Classifier | SimMIM] = []
    own_weights = ("--model.pretrained", "false") if name == OWN_WEIGHTS else ()
    with pytest.MonkeyPatch.context() as patch:
        for create in (create_classifier, create_simmim):
            patch.setattr(
                checks, create.__name__, lambda *a, create=create, **k: built.append(create(*a, **k)) or built[-1]
            )
        return parse(name, pictures, *own_weights), built[-1]


def header(name: str) -> str:
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    comment = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join(line.removeprefix("#").strip() for line in comment)


def source_weights(config: Config) -> tuple[Variant, str | None]:
    """The variant and tag whose weights a recipe starts from."""
    name, pretrained = config.model.name, config.model.pretrained
    if pretrained is True:
        return find_variant(name)
    if "://" in pretrained:
        return find_variant(name)[0], None
    if pretrained.startswith("hf-hub:"):
        return find_variant(pretrained.rpartition("/")[2])
    return find_variant(name)[0], pretrained


def test_every_model_has_a_recipe_of_its_name() -> None:
    # nobody published how the models without weights were trained as classifiers
    of_images = {name for name, variant in VARIANTS.items() if variant.frames is None and variant.weights}
    assert of_images <= set(NAMES)
    assert [name for name in of_images if load_recipe(RECIPES / f"{name}.yaml")["model.name"] != name] == []


@pytest.mark.parametrize("name", NAMES)
def test_header_and_settings_agree(name: str, pictures: Path) -> None:
    (config, model), text = parse_whole(name, pictures), header(name)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if config.model.pretrained:
        source, tag = source_weights(config)
        assert tag is None or tag in source.tags
    assert config.output.dir == f"outputs/{name}"
    assert f"-m classification.train {name}" in text
    assert "\nSource: " in text
    assert "\nDevices: " in text
    assert re.search(r"^Top-1: none|\d\d\.\d % (published|top-1)", text, re.MULTILINE)
    if name not in PUBLISHED:
        return
    variant = find_variant(config.model.name)[0]
    depth = next(value for pattern, value in STOCHASTIC_DEPTH.items() if fnmatchcase(name, pattern))
    assert config.model.overrides["drop_path_rate"] == depth
    # the rates are those of the batch that the command of the header makes
    batch = 8 * config.data.batch_size * config.train.accumulation
    assert config.optimizer.lr_batch_size == batch
    if "simmim" in name:
        _check_simmim(name, config, text)
        return
    assert name.startswith(variant.name)
    assert config.model.overrides.keys() == {"drop_path_rate"}
    assert config.data.input_size == (3, variant.input_size, variant.input_size)
    assert batch == (4096 if "IMAGENET22K" in text else 1024)
    if "IMAGENET22K" not in text:
        tag = "in22k_ft_in1k" if "in22k" in str(config.model.pretrained) else "in1k"
        assert f"\nTop-1: {variant.top1[tag]:.1f} % published" in text


# arXiv:2111.09886, Tab. 6 and the README of microsoft/SimMIM: top-1 after fine-tuning; of SwinV2-B none is published
AFTER_SIMMIM = {
    "swin_base_simmim_100ep": 83.5, "swin_base_simmim_800ep": 84.0, "swin_large_simmim_800ep": 85.4,
    "swinv2_base_simmim_800ep": None,
}  # fmt: skip


def _check_simmim(name: str, config: Config, text: str) -> None:
    pretrained = name.removesuffix("_finetune")
    top1, epochs = AFTER_SIMMIM[pretrained], int(pretrained.rpartition("_")[2].removesuffix("ep"))
    assert config.optimizer.lr_batch_size == 2048
    if name == pretrained:
        assert (config.train.task, config.train.epochs, config.data.input_size) == ("simmim", epochs, (3, 192, 192))
        assert config.simmim.mask_ratio == 0.6
        assert config.schedule.milestones == ((700,) if epochs == 800 else ())
        assert top1 is None or f"{top1} % after {name}_finetune" in text
        return
    before = load_recipe(RECIPES / f"{pretrained}.yaml")
    assert (config.train.task, config.train.epochs, config.data.input_size) == ("classification", 100, (3, 224, 224))
    assert config.model.name == before["model.name"]
    assert f"outputs/{pretrained}/model_last.safetensors" in (RECIPES / f"{name}.yaml").read_text().replace("#   ", "")
    assert f"{epochs}e_in1k-192" in str(config.model.pretrained) or name == OWN_WEIGHTS
    assert config.optimizer.layer_decay < 1
    assert top1 is None or f"Top-1: {top1} % published" in text


def different() -> list[str]:
    """One recipe of each family and of each way of training it: the others are of another size."""
    found: dict[tuple[str, ...], str] = {}
    for name in NAMES:
        settings = load_recipe(RECIPES / f"{name}.yaml")
        size = ("model.name", "model.overrides", "data.input_size", "data.batch_size", "output.dir")
        weights = bool(settings.pop("model.pretrained", False))
        way = {key: value for key, value in settings.items() if key not in size}
        found.setdefault(
            (find_variant(settings["model.name"])[0].family, repr(sorted(way.items())), str(weights)), name
        )
    return list(found.values())


@pytest.mark.parametrize("name", different())
def test_two_steps_with_a_small_model(name: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, _ = parse_whole(name, pictures)
    of_stages = {key: value[:2] for key, value in recipe.model.overrides.items() if isinstance(value, list)}
    small = of_stages | SHRUNKEN[find_variant(recipe.model.name)[0].family]
    weights = "false"
    if recipe.model.pretrained:
        source, _ = source_weights(recipe)
        torch.manual_seed(1)  # not the run's own seed, with which it would draw the same values
        window = {"window_size": 6} if "simmim" in name else {}
        given = create_classifier(source.name, num_classes=5, **{**small, **window}).state_dict()
        save_state_dict(given, tmp_path / "weights.safetensors")
        weights = str(tmp_path / "weights.safetensors")
    accumulation = recipe.train.accumulation
    config = parse(
        name, pictures, "--output-dir", str(tmp_path / "run"), "--epochs", "1", "--device", "cpu",
        "--data.kind", "imagefolder", "--data.input_size", "[3, 32, 32]", "--data.workers", "0",
        "--batch-size", str(GLOBAL_BATCH // accumulation), "--train.threads", "1", "--output.tensorboard", "false",
        "--model.pretrained", weights, *(f"--model.overrides.{key}={value}" for key, value in small.items()),
    )  # fmt: skip
    trainer = Trainer(config)
    before = {key: value.clone() for key, value in trainer.learner.model.state_dict().items()}
    if recipe.model.pretrained:
        patches = next(key for key in given if key.endswith(".weight") and given[key].dim() == 4)
        assert torch.equal(before[patches], given[patches])
    if not recipe.model.freeze_backbone:
        rates = [module.drop_prob for module in trainer.learner.model.modules() if hasattr(module, "drop_prob")]
        assert max(rates, default=0.0) == pytest.approx(recipe.model.overrides["drop_path_rate"])

    metrics = trainer.run()
    stated = recipe.optimizer.lr_batch_size or GLOBAL_BATCH
    said = capsys.readouterr().out
    assert f"global batch {GLOBAL_BATCH}, 2 steps per epoch" in said
    assert f"learning rate {recipe.optimizer.lr * GLOBAL_BATCH / stated:g}" in said
    assert metrics["steps"] == 2
    assert metrics["best"]["val_images"] == 2
    learnt = {"mask_token", "decoder.weight"} if recipe.train.task == "simmim" else {"head.weight", "head.bias"}
    after = trainer.learner.model.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert all(after[key].isfinite().all() for key in after)
    assert learnt <= moved
    assert recipe.model.freeze_backbone == (moved == learnt)
    # what the run leaves is a recipe without a base
    assert parse_command_line([str(tmp_path / "run" / "config.yaml")]) == config


def test_base_lies_below_a_recipe(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: swin_small\noptimizer: {lr: 5.0e-4}\n")
    (tmp_path / "again.yaml").write_text("base: mine.yaml\nmodel: {overrides: {patch_size: 2}}\n")
    mine = parse(str(tmp_path / "mine.yaml"), pictures)
    again = parse(str(tmp_path / "again.yaml"), pictures, "--optimizer.clip_grad", "2")
    small, tiny = load_recipe(RECIPES / "swin_small.yaml"), load_recipe(RECIPES / "swin_tiny.yaml")
    assert (mine.model.name, mine.model.overrides) == ("swin_small", {"drop_path_rate": 0.3})
    assert (mine.optimizer.lr, mine.optimizer.clip_grad, mine.output.dir) == (5e-4, 5.0, "outputs/mine")
    # a setting replaces that of the base whole
    assert (again.model.name, again.model.overrides) == ("swin_small", {"patch_size": 2})
    assert (again.optimizer.lr, again.optimizer.clip_grad) == (5e-4, 2.0)
    assert {key for key in small if small[key] != tiny.get(key)} == {"model.name", "model.overrides"}
    (tmp_path / "written.yaml").write_text(yaml.safe_dump(again.as_dict()))
    assert parse(str(tmp_path / "written.yaml"), pictures) == again


BROKEN_BASES = {
    "circle": ("base: other.yaml", "lead in a circle, mine -> other -> mine"),
    "broken itself": ("base: broken.yaml", "broken.yaml: modle: unknown section; did you mean model?"),
    "misspelt": ("bsae: swin_tiny", "bsae: unknown section; did you mean base?"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN_BASES.values(), ids=BROKEN_BASES.keys())
def test_broken_base(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text + "\n")
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n")
    (tmp_path / "broken.yaml").write_text("modle: {name: swin_tiny}\n")
    with pytest.raises(InputError) as error:
        parse_command_line([str(tmp_path / "mine.yaml")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
