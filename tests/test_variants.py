"""Every named model against the official codes' own counts, the published figures and the packages' weight tables."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hvt_backbones import InputError, WeightsError, create_backbone, create_classifier, list_models
from hvt_backbones.variants import VARIANTS, ModelName, Variant, find_variant

from .conftest import reference_dir

all_variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


@functools.cache
def on_meta(name: str, num_classes: int = 1000) -> torch.nn.Module:
    with torch.device("meta"):
        return create_classifier(name, num_classes=num_classes).eval()


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_named_model_has_a_row() -> None:
    assert sorted(VARIANTS) == sorted(get_args(ModelName))


@all_variants
def test_published_parameters_are_those_of_the_model(variant: Variant) -> None:
    # the sources round to whole millions (Swin; the largest to tenths of a billion) or cut after a tenth (Twins)
    unit = 0.1 if "swin" not in variant.family else 1.0 if variant.params_m < 1000 else 30.0
    assert count(on_meta(variant.name)) / 1e6 == pytest.approx(variant.params_m, abs=unit)


@pytest.fixture(scope="module")
def official() -> dict[str, dict]:
    file = reference_dir() / "variants.json.gz"
    if not file.is_file():
        pytest.skip(f"the official codes' variants are not here: {file} (HVT_REFERENCE_DIR names their folder)")
    with gzip.open(file, "rt") as stream:
        return json.load(stream)["variants"]


def official_names(variant: Variant, entries: dict[str, dict]) -> list[str]:
    return [name for name in entries if name == variant.name or name in variant.aliases]


@all_variants
def test_arguments_are_the_official_ones(variant: Variant, official: dict[str, dict]) -> None:
    for name in official_names(variant, official):
        kwargs = official[name]["kwargs"]
        for key in ("embed_dim", "embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "linear"):
            expected = kwargs.get(key)
            assert variant.arch.get(key) == (tuple(expected) if isinstance(expected, list) else expected), (name, key)
        assert kwargs.get("img_size", variant.input_size) == variant.input_size
        if variant.frames is not None:
            assert variant.arch["window_size"] == (tuple(kwargs["window_size"]),) * 4
            assert on_meta(variant.name).backbone.stages[0].downsample.patch_size == tuple(kwargs["patch_size"])
        elif (window := kwargs.get("window_size")) is not None:
            # the official classifiers shrink a window to the map, which the row says in full
            maps = [variant.input_size // (4 * 2**stage) for stage in range(4)]
            ours = variant.arch["window_size"]
            assert ([ours] * 4 if isinstance(ours, int) else list(ours)) == [min(window, side) for side in maps], name
        assert variant.arch.get("pretrained_window_size", ()) == tuple(kwargs.get("pretrained_window_sizes", ()))


@all_variants
def test_published_flops_are_those_of_the_model(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant.flops_g is None:
        # nobody published a count of the ImageNet-22K models and of the largest
        assert "window12_192" in variant.name or not variant.weights
        return
    # autocast, which SwinV2 turns off around its position bias, does not know the meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        time = () if variant.frames is None else (variant.frames,)
        on_meta(variant.name)(torch.empty(1, 3, *time, variant.input_size, variant.input_size))
    # the Twins tables leave the attention products out; the others round to a tenth
    tolerance = {"rel": 0.06 if variant.family.startswith("twins") else 0.03, "abs": 0.05}
    assert counter.get_total_flops() / 2e9 == pytest.approx(variant.flops_g, **tolerance)


@all_variants
def test_weights_are_in_the_installed_packages_tables(variant: Variant) -> None:
    assert bool(variant.weights) == (variant.name not in ("swinv2_huge", "swinv2_giant"))
    for tag in variant.tags:
        published = variant.published(tag)
        assert published.source
        side = variant.input_size
        assert published.preprocessing.input_size == (3, side, side)
        data = tag.rpartition("_")[2] if variant.frames else tag
        assert published.num_classes == {"in22k": 21841, "k400": 400, "k600": 600, "k700": 700, "ssv2": 174}.get(
            data, 1000
        )


@all_variants
def test_top1_is_the_published_one(variant: Variant) -> None:
    import torchvision

    unpublished = {"in22k", "in22k_ft_k400"} if variant.name == "video_swin_base_window16" else {"in22k"}
    assert set(variant.top1) == set(variant.tags) - unpublished
    for tag, entry in variant.weights.items():
        if entry.startswith("torchvision:"):
            weights = torchvision.models.get_weight(entry.removeprefix("torchvision:"))
            data = "ImageNet-1K" if variant.frames is None else "Kinetics-400"
            assert variant.top1[tag] == weights.meta["_metrics"][data]["acc@1"]
            # it counts clips of 16 frames
            share = 1 if variant.frames is None else variant.frames / 16
            assert share * weights.meta["_ops"] == pytest.approx(variant.flops_g, rel=0.03)


# The published numbers by the papers' names: model, resolution, window, pre-training.
NUMBERS = reference_dir().parent / "NUMBERS.json"
SWIN_LETTERS = {"t": "tiny", "s": "small", "b": "base", "l": "large"}


def video_tag(row: dict) -> str | None:
    """The tag that a row about video speaks of; of papers' figures without a file, none."""
    if "column 'reference'" in row["source"] or row["flops_g"] is None:
        return None
    publisher = "mmaction2_" if row["source"].startswith("open-mmlab/mmaction2") else "official_"
    pretraining = "in22k" if "pretrain=in22k" in row["method"] else "in1k"
    large = row["model"] == "video_swin_l"  # whose one file is mmaction2's
    return ("" if large else publisher) + f"{pretraining}_ft_k400"


def published_rows() -> list[tuple[str, str, dict]]:
    """(our name, tag, row) of every row about ImageNet-1K, or of video, that the authors (or mmaction2) published."""
    rows = []
    for row in json.loads(NUMBERS.read_text()):
        if row["model"].startswith("video_swin") and (tag := video_tag(row)):
            rows.append((f"video_swin_{SWIN_LETTERS[row['model'][-1]]}", tag, row))
        authors = row["source"].startswith(("microsoft/Swin", "whai362/PVT", "Meituan-AutoML/Twins"))
        if row["task"] != "imagenet1k_cls" or not authors:
            continue
        family, _, size = row["model"].rpartition("_")
        resolution, window = row["schedule"].split()[0].rstrip(","), row["schedule"].split()[-1]
        tag = "in22k_ft_in1k" if "22k" in row["method"] else "in1k"
        name = row["model"] if family.startswith("pvt") else f"{family}_{SWIN_LETTERS.get(size, size)}"
        if family == "swin" and resolution == "384":
            name += "_384"
        elif family == "swinv2":
            window = next(word.strip(",") for word in row["schedule"].split() if word.startswith("w")).removeprefix("w")
            name += f"_window12to{window}_{resolution}" if tag == "in22k_ft_in1k" else f"_window{window}"
        rows.append((name, tag, row))
    return rows


def test_figures_are_those_of_the_authors() -> None:
    if not NUMBERS.is_file():
        pytest.skip(f"the published numbers are not here: {NUMBERS}")
    rows = published_rows()
    seen = set()
    for name, tag, row in rows:
        variant = find_variant(name)[0]
        assert variant.top1[tag] == row["metric"]["top1"], name
        # mmaction2 rounds otherwise than the authors
        unit = 0.5 if tag.startswith("mmaction2") else 0.0
        assert variant.params_m == pytest.approx(row["params_m"], rel=0, abs=unit), name
        assert row["flops_g"] is None or variant.flops_g == pytest.approx(row["flops_g"], rel=0, abs=unit), name
        seen.add((variant.name, tag))
    expected = {
        (variant.name, tag)
        for variant in VARIANTS.values()
        for tag in variant.top1
        if not variant.weights[tag].startswith("torchvision:") and not tag.endswith(("k600", "k700", "ssv2"))
    }
    assert seen == expected


def test_aliases_are_unambiguous() -> None:
    aliases = [alias for variant in VARIANTS.values() for alias in variant.aliases]
    assert len(aliases) == len(set(aliases))
    assert not set(aliases) & set(VARIANTS)
    for variant in VARIANTS.values():
        assert set(variant.aliases.values()) <= {None, *variant.tags}
        assert all(find_variant(alias) == (variant, tag) for alias, tag in variant.aliases.items())


NAMES = {
    "swin_tiny": ("swin_tiny", None),
    "Swin-T": ("swin_tiny", None),
    "swin_b": ("swin_base", None),
    "swin_v2_s": ("swinv2_small_window8", None),
    "swin_base_patch4_window7_224.ms_in22k": ("swin_base", "in22k"),
    "swin_base_patch4_window12_384_22kto1k_finetune": ("swin_base_384", "in22k_ft_in1k"),
    "swin_large.in22k": ("swin_large", "in22k"),
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": ("swinv2_base_window12to24_384", "in22k_ft_in1k"),
    "swinv2_tiny_window16_256": ("swinv2_tiny_window16", None),
    "pvt_v2_b2_li.in1k": ("pvt_v2_b2_li", "in1k"),
    "PVTv2-B2-Li": ("pvt_v2_b2_li", None),
    "alt_gvt_large": ("twins_svt_large", None),
    "pcpvt_base": ("twins_pcpvt_base", None),
    "Twins-SVT-S": ("twins_svt_small", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_users_write(name: str) -> None:
    variant, tag = find_variant(name)
    assert (variant.name, tag) == NAMES[name]


def test_every_timm_name_of_these_models_is_understood() -> None:
    import timm

    for variant in VARIANTS.values():
        for tag, entry in variant.weights.items():
            if entry.startswith("timm:"):
                name = entry.removeprefix("timm:")
                assert name in timm.list_pretrained(name.partition(".")[0] + "*")
                assert find_variant(name) == (variant, tag)
                assert find_variant(name.partition(".")[0])[0] is variant


UNKNOWN = {
    "swin_tinny": "swin_tiny",
    "swinv2_tiny": "swinv2_tiny_window8 or swinv2_tiny_window16",  # the user has to choose
    "swinv2_t": "swinv2_tiny_window8 or swinv2_tiny_window16",
    "pvt_v2_b9": "pvt_v2_b",
    "resnet50": "hvt models",
    "": "hvt models",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_name_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(InputError, match=UNKNOWN[name]) as raised:
        create_backbone(name)
    assert "\n" not in str(raised.value)


def test_unknown_tag_is_answered_with_those_there_are() -> None:
    with pytest.raises(WeightsError, match="in1k, in22k_ft_in1k, in22k"):
        find_variant("swin_base_384.in21k")
    with pytest.raises(WeightsError, match="swin_large has no weights 'in1k'"):
        VARIANTS["swin_large"].published("in1k")


def test_list_models() -> None:
    assert set(list_models()) == set(VARIANTS)
    assert list_models("PVT-v2*") == [f"pvt_v2_{size}" for size in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")]
    # numbers by value: window8 before window12 and window16
    assert [name.partition("window")[2] for name in list_models("swinv2_base*")] == [
        "8",
        "12_192",
        "12to16_256",
        "12to24_384",
        "16",
    ]
    assert list_models("resnet*") == []
