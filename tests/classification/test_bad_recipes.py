"""Mutations of every shipped recipe: each gives one line, with the key and what is accepted, and starts nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import yaml
from accelerate.state import PartialState
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from classification import train
from classification.command_line import (
    FIELDS,
    RECIPES,
    SECTIONS,
    describe,
    describe_limits,
    load_recipe,
    parse_command_line,
)  # fmt: skip

SHIPPED = sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)
TYPES = {key: describe(schema) for key, schema in FIELDS.items()}
NUMBERS = [key for key, accepted in TYPES.items() if accepted in ("integer", "number")]
LISTS = [key for key, accepted in TYPES.items() if accepted.startswith("list")]
CHOICES = [key for key, accepted in TYPES.items() if "|" in accepted]
SWITCHES = [key for key, accepted in TYPES.items() if accepted == "true or false"]
TEXTS = [key for key, accepted in TYPES.items() if accepted in ("text", "text or null")]
BOUNDED = {
    words: [key for key in [*NUMBERS, *LISTS] if words in describe_limits(key)]
    for words in ("at least", "at most", "more than")
}

Mutation = tuple[str, str]  # what a message must name, and the text of the recipe


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A device, a group of processes or a worker that is started after all ends the test with its own error."""

    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mutated recipe has started something")

    for owner, name in (
        (PartialState, "__init__"), (DataLoader, "__init__"), (torch.cuda, "_lazy_init"), (torch.nn.Module, "to"),
        (torch.distributed, "init_process_group"), (torch.accelerator, "current_accelerator"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, start)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)


def complete(recipe: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The recipe's sections with everything that it asks of its caller: pictures, and weights to fine-tune."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in load_recipe(recipe).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    if sections.get("data", {}).get("kind") != "digits":
        for split in ("train", "val"):
            (folder / "pictures" / split).mkdir(parents=True, exist_ok=True)
        sections.setdefault("data", {})["dir"] = "pictures"
    pretrained = sections["model"].get("pretrained")
    if isinstance(pretrained, str) and not Path(pretrained).exists():
        (folder / "weights.pth").touch()
        sections["model"]["pretrained"] = "weights.pth"
    return sections


def error_of(text: str, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The one line that the trainer says about a recipe; checks all that every mistake has in common."""
    (folder / "mutated.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    status = train.main(["mutated.yaml"])
    output, error = capsys.readouterr()
    assert status == 2, f"taken: {text[:2000]}"
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) < 1500
    assert output == ""
    assert sorted(folder.rglob("*")) == before
    return error


def says_what_is_accepted(error: str) -> bool:
    return re.search(r"expected |must be (at least|at most|more than) |did you mean |known: ", error) is not None


# ---- mutations that hypothesis makes

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
STRANGE_TEXT = st.sampled_from(["", " ", "\n", "a\0b", "\x1b[31m", "\u2028\x85"]) | st.text("\t\x00\x7f", min_size=1)
HUGE = st.integers(10**10, 10**400) | st.floats(1e12, 1e308)
NO_NUMBER = st.sampled_from([float("nan"), float("inf"), float("-inf"), "nan", "-inf", "1e", "0x", "ten", [], [1], {}])


def dumped(sections: Any) -> str:
    return yaml.safe_dump(sections, allow_unicode=True)


@st.composite
def mutations(draw: st.DrawFn, sections: dict[str, dict[str, Any]]) -> Mutation:
    """A recipe with one mistake that no value of it can make right."""

    def with_value(key: str, value: Any) -> Mutation:
        section, name = key.split(".")
        return key, dumped({**sections, section: {**sections.get(section, {}), name: value}})

    kind = draw(
        st.sampled_from(
            ["unknown key", "unknown section", "no section", "no number", "huge", "low", "no choice", "no switch",
             "wrong list", "strange text", "no text", "nested junk", "overrides", "no mapping", "repeated",
             "absent file"]
        )
    )  # fmt: skip
    if kind == "unknown key":
        section = draw(st.sampled_from(sorted(SECTIONS)))
        name = draw(st.text("abcdefghijklmnop_é漢", min_size=1, max_size=12))
        while f"{section}.{name}" in FIELDS:
            name += "_"
        return with_value(f"{section}.{name}", draw(JUNK))
    if kind == "unknown section":
        name = draw(st.text("abcdefghijklm_é漢", min_size=1, max_size=12).filter(lambda name: name != "base"))
        name = f"{name}_" if name in SECTIONS else name
        return name, dumped({**sections, name: draw(JUNK)})
    if kind == "no section":
        section = draw(st.sampled_from(sorted(SECTIONS)))
        return section, dumped({**sections, section: draw(JUNK.filter(lambda value: not isinstance(value, dict)))})
    if kind == "no number":
        return with_value(draw(st.sampled_from(NUMBERS)), draw(NO_NUMBER))
    if kind == "huge":
        key, value = draw(st.sampled_from(BOUNDED["at most"])), draw(HUGE)
        value = int(value) if TYPES[key] == "integer" else value
        return with_value(key, [value] * 3 if key in LISTS else value)
    if kind == "low":
        key = draw(st.sampled_from([*BOUNDED["at least"], *BOUNDED["more than"]]))
        value = -draw(st.integers(1, 10**20))
        return with_value(key, [value] * 3 if key in LISTS else value)
    if kind == "no choice":
        return with_value(draw(st.sampled_from(CHOICES)), draw(JUNK | st.just("NONE")))
    if kind == "no switch":
        return with_value(
            draw(st.sampled_from(SWITCHES)), draw(st.integers() | st.floats() | st.sampled_from(["maybe", []]))
        )
    if kind == "wrong list":
        key = draw(st.sampled_from(LISTS))
        wrong = st.lists(st.floats(0.5, 1), min_size=4, max_size=9) | st.lists(
            st.text(max_size=3), min_size=1, max_size=3
        )
        return with_value(key, draw(wrong | st.sampled_from([[], [[1, 2, 3]], {"a": 1}, 3, "3", None, [None] * 3])))
    if kind == "strange text":
        return with_value(draw(st.sampled_from(TEXTS)), draw(STRANGE_TEXT))
    if kind == "no text":
        return with_value(
            draw(st.sampled_from(TEXTS)), draw(st.integers() | st.floats() | st.lists(st.none(), max_size=2))
        )
    if kind == "nested junk":
        key = draw(st.sampled_from([*NUMBERS, *CHOICES, *SWITCHES]))
        return with_value(
            key, draw(st.lists(JUNK, min_size=1, max_size=2) | st.dictionaries(st.text(max_size=3), JUNK))
        )
    if kind == "overrides":
        value = draw(JUNK.filter(lambda value: value not in ({}, None)) | st.fixed_dictionaries({"depths": JUNK}))
        return with_value("model.overrides", value)
    if kind == "no mapping":
        return "expected sections", dumped(draw(JUNK.filter(lambda value: not isinstance(value, dict))))
    if kind == "repeated":
        section = draw(st.sampled_from(sorted(sections)))
        name = draw(st.sampled_from(sorted(sections[section])))
        text = dumped(sections[section])
        indented = "\n".join(f"  {line}" for line in [*text.splitlines(), f"{name}: 1"])
        others = {other: values for other, values in sections.items() if other != section}
        return f"{section}.{name} is given twice", f"{dumped(others)}{section}:\n{indented}\n"
    name = draw(st.text("abcäöü漢 ", min_size=1, max_size=300).filter(str.strip))
    key = draw(st.sampled_from(["model.pretrained", "data.dir", "output.resume"]))
    if key == "data.dir":
        sections = {**sections, "data": {**sections.get("data", {}), "kind": "imagefolder"}}
    return with_value(key, f"nowhere/{name}")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: path.stem)
def test_mutated_recipe_is_one_line_and_starts_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sections = complete(recipe, tmp_path)
    (tmp_path / "sound.yaml").write_text(dumped(sections))
    parse_command_line(["sound.yaml"])  # what is refused below is refused for its mutation

    @seed(crc32(recipe.stem.encode()))  # other mutations for each recipe
    @settings(
        max_examples=120 if recipe.stem in ("digits", "swin_tiny") else 6, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
    )  # fmt: skip
    @given(mutation=mutations(sections))
    def mutated(mutation: Mutation) -> None:
        named, text = mutation
        error = error_of(text, tmp_path, capsys)
        assert named in error or named.encode("unicode_escape").decode() in error
        assert says_what_is_accepted(error)

    mutated()


# ---- mistakes of a kind that takes thought: each is applied to a recipe of each kind

CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "grey pictures, means of colours": ({"data.input_size": [1, 32, 32], "data.mean": [0.1] * 3}, "data.mean"),
    "two channels": ({"data.input_size": [2, 32, 32]}, "data.input_size"),
    "bounds swapped": ({"augmentation.scale": [0.9, 0.5]}, "augmentation.scale"),
    "ratio swapped": ({"augmentation.ratio": [4, 0.25]}, "augmentation.ratio"),
    "pairs of an odd batch": ({"augmentation.mixup": 0.8, "data.batch_size": 7}, "data.batch_size"),
    "batch of terabytes": ({"data.batch_size": 65536, "data.input_size": [3, 8192, 8192]}, "data.batch_size"),
    "lowest rate above the highest": ({"schedule.min_lr": 0.5, "optimizer.lr": 0.1}, "schedule.min_lr"),
    "warm-up from above": (
        {"schedule.warmup_lr": 0.5, "schedule.min_lr": 0, "optimizer.lr": 0.1}, "schedule.warmup_lr"
    ),
    "fp16 on the CPU": ({"train.amp": "fp16", "train.device": "cpu"}, "train.amp"),
    "fp16 with FSDP2": ({"train.amp": "fp16", "train.device": "npu", "parallel.mode": "fsdp2"}, "train.amp"),
    "ZeRO on the CPU": ({"train.device": "cpu", "train.amp": "fp32", "parallel.mode": "zero2"}, "parallel.mode"),
    "offloading without FSDP2": ({"parallel.cpu_offload": True, "parallel.mode": "ddp"}, "parallel.cpu_offload"),
    "diagnoses with ZeRO": (
        {"output.diagnose_steps": 9, "train.device": "npu", "train.amp": "fp32", "parallel.mode": "zero1"},
        "output.diagnose_steps",
    ),
    "class map of nothing": ({"model.class_map": "map.txt", "model.pretrained": False}, "model.class_map"),
    "everything frozen, stages too": (
        {"model.freeze_backbone": True, "model.freeze_stages": 1}, "model.freeze_backbone"
    ),
    "everything frozen, rates decay": (
        {"model.freeze_backbone": True, "optimizer.layer_decay": 0.9}, "model.freeze_backbone"
    ),
    "resume and replace": ({"output.resume": "auto", "output.overwrite": True}, "output.resume"),
    "changes without a resumed run": ({"output.allow_changes": True, "output.resume": None}, "output.allow_changes"),
    "measure and resume": ({"train.benchmark_steps": 5, "output.resume": "auto"}, "train.benchmark_steps"),
    "trained on what is held out": ({"data.val_split": "./train", "data.train_split": "train"}, "data.val_split"),
    "fewer pictures than a batch": (
        {"data.kind": "synthetic", "data.synthetic_images": 3, "data.batch_size": 4}, "data.synthetic_images"
    ),
    "no data": ({"data.kind": "imagefolder", "data.dir": None}, "data.dir"),
    "no model": ({"model.name": None}, "model.name"),
    "unknown model": ({"model.name": "swin_tiny_"}, "model.name"),
    "model of clips": ({"model.name": "video_swin_tiny"}, "model.name"),
    "unknown optimiser": ({"optimizer.name": "adamv"}, "optimizer.name"),
    "optimiser of another kind of rates": ({"optimizer.name": "adan"}, "optimizer.name"),
    "unknown policy": ({"augmentation.auto_augment": "rnad-m9"}, "augmentation.auto_augment"),
    "policy that timm would shorten": ({"augmentation.auto_augment": "rand-m-n"}, "augmentation.auto_augment"),
    "policy of a million layers": ({"augmentation.auto_augment": "rand-n1000000"}, "augmentation.auto_augment"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "finetune", "linear_probe", "pvt_v2_b0", "swin_tiny"])
def test_contradictory_recipe_is_one_line_and_starts_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sound = complete(RECIPES / f"{recipe}.yaml", tmp_path)
    for mistake, (changes, named) in CONTRADICTIONS.items():
        sections = deepcopy(sound)
        for key, value in changes.items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        error = error_of(dumped(sections), tmp_path, capsys)
        assert error.startswith(f"error: {named}: "), f"{mistake}: {error}"
        assert says_what_is_accepted(error), f"{mistake}: {error}"


WRONG_MODELS: dict[str, tuple[str, str]] = {
    "unknown argument": ("--model.overrides.embed_dims=3", "model.overrides: swinv2_tiny_window8 has no argument"),
    "heads that do not divide": ("--model.overrides.num_heads=[5, 5]", "model.overrides"),
    "other number of stages": ("--model.overrides.depths=[2]", "model.overrides"),
    "a million blocks": ("--model.overrides.depths=[1000000, 2]", "model.overrides: depths are more than 1000"),
    "absurd width": ("--model.overrides.embed_dim=99996", "model.overrides: the model would have"),
    "width that overflows": ("--model.overrides.embed_dim=1.0e+300", "model.overrides: embed_dim has no value"),
    "no rate": ("--model.overrides.drop_path_rate=.nan", "model.overrides: drop_path_rate has no value"),
    "a date": ("--model.overrides.drop_path_rate=2020-01-01", "model.overrides: drop_path_rate has no value"),
    "classes": ("--model.overrides.num_classes=3", "model.overrides: num_classes is said by the data"),
    "class map": ("--model.overrides.class_map=[1]", "model.overrides: class_map is said by model.class_map"),
    "channels twice": ("--model.overrides.in_chans=4", "model.overrides: in_chans is 4, data.input_size has 3"),
    "pictures smaller than a patch": ("--data.input_size=[3, 2, 2]", "data.input_size: swinv2_tiny_window8 cannot"),
    "more stages than there are": ("--model.freeze_stages=3", "model.freeze_stages: must be at most 2"),
    "unknown weights": ("--model.pretrained=in1", "model.pretrained: swinv2_tiny_window8 has no weights 'in1'"),
    "missing weights": ("--model.pretrained=no/such.pth", "model.pretrained: file no/such.pth does not exist"),
    "missing run": ("--resume=no/such", "output.resume: no/such does not exist"),
    "missing folder": ("--data.kind=tar", "data.dir: missing"),
}


@pytest.mark.parametrize(("option", "message"), WRONG_MODELS.values(), ids=WRONG_MODELS.keys())
def test_what_only_the_model_or_the_disk_knows(option: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["digits", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert says_what_is_accepted(error)


def test_missing_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    for options, message in (
        (["--data-dir", "x" * 5000], "data.dir: folder xxx"),
        (["--data-dir", "pictures"], "data.val_split: pictures holds no folder val"),
        (
            ["--data-dir", "pictures", "--data.kind", "tar", "--data.dir", "none"],
            "data.dir: folder none does not exist",
        ),
        (["--data-dir", "pictures", "--model.class_map", "no.txt", "--model.pretrained", "true"], "model.class_map"),
    ):
        assert train.main(["swin_tiny", *options]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")


BROKEN_YAML = {
    "bracket": ("model: {name: [", "line 1"),
    "tab": ("model:\n\tname: swin_tiny", "line 2"),
    "program": ("model: !!python/object/apply:os.system [ls]", "line 1"),
    "date that is none": ("model: {name: 2020-13-45}", "month"),
    "number of too many digits": (f"model: {{name: swin_tiny, freeze_stages: {'9' * 5000}}}", "is not YAML"),
    "brackets without end": ("[" * 5000, "is not YAML"),
    "control character": ("model: {name: swin\x07}", "is not YAML"),
    "half a surrogate pair": ("model: {name: \ud800}", "cannot be read as text"),
    "two documents": ("model: {name: swin_tiny}\n---\nmodel: {}", "line 2"),
    "key twice": ("model: {name: swin_tiny, name: swin_base}", "line 1: model.name is given twice"),
    "section twice": ("model: {name: swin_tiny}\ndata: {}\nmodel: {}", "line 3: model is given twice"),
    "override twice": ("model:\n  overrides:\n    a: 1\n    a: 2", "line 4: model.overrides.a is given twice"),
    "list as a key": ("? [a, b]\n: 3", "is not YAML"),
    "alias of itself": (
        "data: {kind: digits}\nmodel: &a {name: swin_tiny, overrides: *a}",
        "model.overrides: name is said by model.name",
    ),
    "alias of a list in itself": (
        "data: {kind: digits}\nmodel: {name: swin_tiny, overrides: {depths: &a [*a]}}",
        "model.overrides: depths has no value that an argument takes",
    ),
    "list in itself": ("model: {name: swin_tiny}\ndata: {mean: &a [*a]}", "data.mean: expected list of numbers"),
    "aliases that multiply": (
        "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n"
        "model: {name: *f}", "a: unknown section"
    ),
    "empty": ("", "expected sections"),
    "a comment": ("# model: {name: swin_tiny}", "expected sections"),
    "sections without settings": ("model:\n  # name: swin_tiny\ndata:", "model: expected settings below it"),
    "base that is no name": ("base: [swin_tiny]", "base: expected the name or file of another recipe"),
    "base that is not there": ("base: swin_tny", "base: recipe 'swin_tny' is neither a file nor a shipped recipe"),
    "base of itself": ("base: mutated.yaml", "base: the bases lead in a circle"),
    "dotted keys": ("model.name: swin_tiny", "did you mean model?"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BROKEN_YAML.values(), ids=BROKEN_YAML.keys())
def test_broken_yaml(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = error_of(text, tmp_path, capsys)
    assert message in error
    assert says_what_is_accepted(error)


def test_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "weights.pth").write_bytes(bytes(range(256)))
    assert train.main(["weights.pth"]) == 2
    assert "weights.pth: cannot be read as text" in capsys.readouterr().err
    assert train.main([str(tmp_path)]) == 2
    assert "neither a file nor a shipped recipe" in capsys.readouterr().err


def test_the_trap_is_armed(tmp_path: Path) -> None:
    """A sound recipe does start something, so that the tests above would see it."""
    with pytest.raises(AssertionError, match="has started something"):
        train.main(["digits", "--epochs", "1"])


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {name: swin_tiny}\ndata: {kind: synthetic, bach_size: 3}\n")
    command = [sys.executable, "-m", "classification.train", "mine.yaml", "--device", "cuda"]
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"error: data\.bach_size: unknown setting; did you mean data\.batch_size\? expected .*\n", done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
