"""`load_weights`: what becomes of every key, and a model that stays untouched on any error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvt_backbones import (
    Backbone,
    Classifier,
    InputError,
    PyramidVisionTransformerV2,
    SwinTransformer,
    SwinTransformerV2,
    TwinsPCPVT,
    TwinsSVT,
    WeightsError,
    convert_state_dict,
    load_weights,
)
from hvt_backbones.backbone import Stage

SWIN = {"embed_dim": 8, "depths": (2, 1, 2), "num_heads": (1, 2, 2), "window_size": 4}
DIMS = {"embed_dims": (8, 16), "num_heads": (1, 2), "mlp_ratios": (2, 2), "sr_ratios": (2, 1), "depths": (2, 1)}


def swin(**more) -> SwinTransformer:
    return SwinTransformer(**{**SWIN, "out_indices": (0, 1, 2), **more})


def swinv2(**more) -> SwinTransformerV2:
    return SwinTransformerV2(**{**SWIN, "out_indices": (0, 1, 2), **more})


def pvt_v2(**more) -> PyramidVisionTransformerV2:
    return PyramidVisionTransformerV2(**{**DIMS, "out_indices": (0, 1), **more})


def twins_svt(**more) -> TwinsSVT:
    return TwinsSVT(**{**DIMS, "window_sizes": (4, 4), "out_indices": (0, 1), **more})


def classifier(num_classes: int = 5, **more) -> Classifier:
    return Classifier(swin(**{"out_indices": (2,), **more}), num_classes)


def randomised(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def weights(model: nn.Module, layout: str = "official", **more) -> dict[str, Tensor]:
    return convert_state_dict(randomised(model).state_dict(), to=layout, **more)


def test_all_keys_are_loaded() -> None:
    source = randomised(classifier())
    model = classifier()
    report = load_weights(model, source.state_dict())
    assert report.ok
    assert report.layout == "hvt"
    assert report.family == "swin"
    assert report.loaded == list(model.state_dict())
    for key, tensor in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0)


def test_a_backbone_takes_a_classifier() -> None:
    official = weights(classifier())
    model = swin()
    report = load_weights(model, official)
    assert report.dropped == ["head.weight", "head.bias"]
    assert report.reasons["dropped"]["head.weight"] == "the model has no head"
    assert report.initialised == [f"stages.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias")]
    assert all(key.endswith("relative_position_index") for key in report.recomputed)
    assert len(report.recomputed) == 5
    torch.testing.assert_close(model.stages[2].norm.weight, official["norm.weight"])
    assert torch.equal(model.stages[0].norm.weight, torch.ones(8))


def test_a_classifier_takes_a_backbone() -> None:
    dense = weights(swin())
    model = classifier()
    report = load_weights(model, dense)
    assert report.initialised == ["head.weight", "head.bias"]
    assert report.dropped == [f"norm{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]
    torch.testing.assert_close(model.backbone.stages[2].norm.weight, dense["norm2.weight"])


def test_a_detector_fills_a_backbone() -> None:
    detector = {f"backbone.{key}": tensor for key, tensor in weights(swin(), "mmdet").items()}
    detector["neck.lateral_convs.0.conv.weight"] = torch.ones(2)
    model = swin()
    report = load_weights(model, {"meta": {"epoch": 12}, "state_dict": detector})
    assert report.dropped == ["neck.lateral_convs.0.conv.weight"]
    assert "outside 'backbone.'" in str(report)


OUTPUT_NORMS = {
    "a detector with fewer outputs": (
        lambda: weights(swin(out_indices=(1, 2)), "mmdet"),
        swin,
        r"\[1, 2\].*\[0, 1, 2\]",
    ),
    "maps without norms": (lambda: weights(swin(output_norm=False), "huggingface"), swin, r"\[\].*output_norm"),
    "a classifier without its own": (
        lambda: {key: tensor for key, tensor in weights(classifier()).items() if not key.startswith("norm.")},
        swin,
        r"6 keys .* are missing",
    ),
    "stages without norms": (
        lambda: weights(twins_svt(norm_after_stage=False), "mmseg"),
        twins_svt,
        r"\[\], the model after \[0, 1\] \(see norm_after_stage",
    ),
    "a model of this library with one output": (
        lambda: randomised(swin(out_indices=(2,))).state_dict(),
        swin,
        r"\[2\], the model after \[0, 1, 2\] \(see out_indices",
    ),
    "an official one": (lambda: weights(swin(out_indices=(2,))), swin, r"\[2\].*\[0, 1, 2\]"),
    "one of SwinV2": (lambda: weights(swinv2(out_indices=(2,)), "mmpretrain"), swinv2, r"\[2\].*\[0, 1, 2\]"),
    "one of mmsegmentation": (lambda: weights(swin(out_indices=(2,)), "mmseg"), swin, r"\[2\].*\[0, 1, 2\]"),
    "one of transformers": (lambda: weights(swin(out_indices=(2,)), "huggingface"), swin, r"\[2\].*\[0, 1, 2\]"),
    "a dense Twins with a norm after the last stage": (
        lambda: weights(twins_svt(norm_after_stage=(False, True)), "mmseg"),
        twins_svt,
        r"\[1\], the model after \[0, 1\] \(see norm_after_stage",
    ),
}


@pytest.mark.parametrize(("given", "build", "message"), OUTPUT_NORMS.values(), ids=OUTPUT_NORMS.keys())
def test_a_norm_that_the_weights_could_have_had_is_missing(given: Callable, build: Callable, message: str) -> None:
    """New, it would give other maps than those of the weights, behind a report that says that all is well."""
    with pytest.raises(WeightsError, match=message):
        load_weights(build(), given())


def in_mmpretrain() -> dict[str, Tensor]:
    """A classifier of mmpretrain around an `HVTBackbone`."""
    model = randomised(swin(out_indices=(2,)))
    backbone = {f"backbone.model.{key}": tensor for key, tensor in model.state_dict().items()}
    return {**backbone, "head.fc.weight": torch.ones(5, 32), "head.fc.bias": torch.ones(5)}


def of_simmim() -> dict[str, Tensor]:
    """mmpretrain's `SimMIMSwinTransformer` has one output, with its number, and no head."""
    backbone = {f"backbone.{key}": tensor for key, tensor in weights(swin(out_indices=(2,)), "mmpretrain").items()}
    return {**backbone, "backbone.mask_token": torch.ones(1, 1, 8), "neck.decoder.0.weight": torch.ones(1)}


def headless() -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights(classifier()).items() if not key.startswith("head.")}


CLASSIFIERS = {
    "ours": lambda: randomised(classifier()).state_dict(),
    "ours without classes": lambda: randomised(classifier(0)).state_dict(),
    "official": lambda: weights(classifier()),
    "official without its head": headless,
    "timm without its head": lambda: weights(swin(out_indices=(2,)), "timm"),
    "mmpretrain": lambda: weights(classifier(), "mmpretrain"),
    "transformers": lambda: weights(classifier(), "huggingface"),
    "an HVTBackbone in mmpretrain": in_mmpretrain,
    "SimMIM in mmpretrain": of_simmim,
}


@pytest.mark.parametrize("given", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_norms_of_outputs_are_new_to_a_classifier(given: Callable) -> None:
    report = load_weights(swin(), given())
    assert report.ok
    assert report.initialised == [f"stages.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias")]


def test_maps_without_norms() -> None:
    source = randomised(swin(output_norm=False)).eval()
    model = swin(output_norm=False).eval()
    assert load_weights(model, weights(source, "huggingface")).ok
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), source(images))


def test_one_of_several_sets_of_weights(caplog) -> None:
    trained, average = weights(classifier()), weights(classifier())
    checkpoint = {"state_dict": trained, "optimizer": {"state": {0: torch.ones(1)}}, "state_dict_ema": average}
    model = classifier()
    report = load_weights(model, checkpoint)
    torch.testing.assert_close(model.head.weight.data, trained["head.weight"])
    assert (report.weights_key, report.other_weights) == ("state_dict", ("state_dict_ema",))
    assert "its 'state_dict', not state_dict_ema (weights_key=)" in str(report)
    assert "weights_key chooses 'state_dict_ema' instead" in caplog.text
    caplog.clear()
    assert load_weights(model, checkpoint, weights_key="state_dict_ema").weights_key == "state_dict_ema"
    torch.testing.assert_close(model.head.weight.data, average["head.weight"])
    assert not caplog.text
    with pytest.raises(
        WeightsError, match="no weights under 'ema': choose weights_key= among 'state_dict', 'state_dict_ema'"
    ):
        load_weights(model, checkpoint, weights_key="ema")


def test_trained_weights_beside_a_key_with_their_average(caplog) -> None:
    trained, average = weights(classifier()), weights(classifier())
    checkpoint = {**trained, "model_ema": average, "epoch": 3}
    model = classifier()
    report = load_weights(model, checkpoint)
    torch.testing.assert_close(model.head.weight.data, trained["head.weight"])
    assert (report.weights_key, report.other_weights) == (None, ("model_ema",))
    assert "its top level, not model_ema (weights_key=)" in str(report)
    assert "taken is what lies at its top; weights_key chooses 'model_ema' instead" in caplog.text
    load_weights(model, checkpoint, weights_key="model_ema")
    torch.testing.assert_close(model.head.weight.data, average["head.weight"])


WRONG_KINDS = {
    "source": (None, 3, True, b"weights.pth", ["a.pth", "b.pth"], [[1, 2], [3, 4]], torch.ones(50, 50), {1, 2}),
    "weights_key": (3, True, b"model", "", ["model"], [[1, 2], [3, 4]], torch.ones(50, 50), {"model": 1}),
    "layout": (None, 3, True, b"hvt", ["hvt"], [[1, 2], [3, 4]], torch.ones(2), ""),
    "class_map": (3, True, 0.5, b"map.txt", ["a", "b"], [[0, 1], [2, 3]], [[0, 1], [2]], [True, False, True],
                  [0.5, 1.0], [1j, 1], [2**70, 1], (), {0: 1}, {0, 1}, [None, 1], torch.ones(50, 50), iter([0, 1])),
}  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [pytest.param(name, value, id=f"{name}-{value!r:.20}") for name, values in WRONG_KINDS.items() for value in values],
)
def test_arguments_of_the_wrong_kind(argument: str, value: object) -> None:
    arguments = {"source": {"model": randomised(classifier(7)).state_dict()}, argument: value}
    model = classifier(3)
    before = model.head.weight.clone()
    with pytest.raises(InputError, match=f"{argument} is |no {argument} ") as caught:
        load_weights(model, **arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    assert torch.equal(model.head.weight, before)


def test_stages_that_are_not_built() -> None:
    report = load_weights(swin(out_indices=(0, 1)), weights(swin()))
    assert report.ok
    assert not report.unexpected
    assert {key.split(".")[0] for key in report.dropped} == {"layers", "norm2"}
    assert "layers.1.downsample.norm.weight" in report.dropped
    assert report.reasons["dropped"]["norm2.weight"] == "the model ends with stage 1"


def test_a_head_of_another_class_count() -> None:
    model = classifier(3)
    before = model.head.weight.clone()
    report = load_weights(model, weights(classifier(5)))
    assert report.dropped == ["head.weight", "head.bias"]
    assert report.initialised == ["head.weight", "head.bias"]
    assert report.reasons["initialised"]["head.weight"] == "a head of another class count"
    assert "a head of 5 classes, the model has 3" in str(report)
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("kind", ["list", "tensor", "path"])
def test_class_map(kind: str, tmp_path: Path) -> None:
    official = weights(classifier(7))
    rows = [6, 0, 3]
    path = tmp_path / "map.txt"
    path.write_text("6\n0\n3\n", encoding="utf-8")
    model = classifier(3)
    report = load_weights(model, official, class_map={"list": rows, "tensor": torch.tensor(rows), "path": path}[kind])
    torch.testing.assert_close(model.head.weight, official["head.weight"][rows])
    torch.testing.assert_close(model.head.bias, official["head.bias"][rows])
    assert report.adapted == ["head.weight", "head.bias"]
    assert not report.dropped
    assert official["head.weight"].shape[0] == 7, "the source was changed"


def bicubic_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Head by head, as a picture."""
    pictures = [F.interpolate(column.view(1, 1, *old), size=new, mode="bicubic").flatten() for column in table.T]
    return torch.stack(pictures, dim=1)


@pytest.mark.parametrize("window", [7, 3, (3, 6)], ids=str)
def test_position_tables_are_resized(window: int | tuple[int, int]) -> None:
    official = weights(swin())
    model = swin(window_size=window)
    report = load_weights(model, official)
    assert len(report.resized) == 5
    assert report.ok
    sides = (window, window) if isinstance(window, int) else window
    assert report.reasons["resized"][report.resized[0]] == f"window 4x4 to {sides[0]}x{sides[1]}"
    table = official["layers.1.blocks.0.attn.relative_position_bias_table"]
    expected = bicubic_table(table, (7, 7), tuple(2 * side - 1 for side in sides))
    torch.testing.assert_close(model.stages[1].blocks[0].attn.position_bias.table, nn.Parameter(expected))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 50, 70))[-1].isfinite().all()


def test_absolute_embedding_is_resized() -> None:
    official = weights(swin(ape_size=8))
    model = swin(ape_size=(4, 6))
    report = load_weights(model, official)
    assert report.reasons["resized"] == {"absolute_pos_embed": "grid 8x8 to 4x6"}
    expected = F.interpolate(official["absolute_pos_embed"], size=(4, 6), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.absolute_pos_embed, nn.Parameter(expected))


def test_absolute_embedding_of_tokens_takes_the_grid_of_the_model() -> None:
    source = randomised(classifier(ape_size=(8, 2)))
    model = classifier(ape_size=(8, 2))
    assert load_weights(model, convert_state_dict(source.state_dict(), to="official")).ok
    torch.testing.assert_close(model.backbone.absolute_pos_embed, source.backbone.absolute_pos_embed)


def test_swinv2_recomputes_for_another_window() -> None:
    official = weights(swinv2(), window_size=4)
    report = load_weights(swinv2(window_size=6, pretrained_window_size=4), official)
    assert report.ok
    assert not report.resized
    assert {key.rpartition(".")[2] for key in report.recomputed} == {"relative_position_index", "relative_coords_table"}


@pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
def test_other_input_channels(in_chans: int) -> None:
    official = weights(swin())
    model = swin(in_chans=in_chans)
    report = load_weights(model, official)
    assert report.adapted == ["stages.0.downsample.proj.weight"]
    from timm.models import adapt_input_conv

    expected = adapt_input_conv(in_chans, official["patch_embed.proj.weight"])
    torch.testing.assert_close(model.stages[0].downsample.proj.weight, nn.Parameter(expected))


def test_one_channel_becomes_three() -> None:
    official = weights(swin(in_chans=1))
    model = swin(in_chans=3)
    load_weights(model, official)
    gray = torch.randn(1, 1, 4, 4)
    expected = F.conv2d(gray, official["patch_embed.proj.weight"])
    torch.testing.assert_close(F.conv2d(gray.repeat(1, 3, 1, 1), model.stages[0].downsample.proj.weight), expected)


def test_twins_norms() -> None:
    """Norms between the stages are part of an SVT trained with them, and new to one trained without."""
    plain = Classifier(twins_svt(norm_after_stage=(False, True), out_indices=(1,)), 5)
    dense = twins_svt(norm_after_stage=True)
    report = load_weights(dense, weights(plain))
    assert report.initialised == ["stages.0.norm.weight", "stages.0.norm.bias"]
    with pytest.raises(WeightsError, match=r"no place in the model .norm_list.0.weight"):
        load_weights(plain, weights(dense))
    pcpvt = TwinsPCPVT(**DIMS, out_indices=(0, 1), norm_after_stage=False)
    source = Classifier(TwinsPCPVT(**DIMS, out_indices=(1,), norm_after_stage=(False, True)), 5)
    report = load_weights(pcpvt, weights(source))
    assert report.dropped == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_take_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    official = {key: t.to(dtype) if t.is_floating_point() else t for key, t in weights(swin()).items()}
    model = swin()
    load_weights(model, official)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    model = swin().to(dtype)
    load_weights(model, official)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_the_cached_position_bias_follows() -> None:
    model = swin().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(images)
        source = randomised(swin()).eval()
        load_weights(model, source.state_dict())
        torch.testing.assert_close(model(images)[-1], source(images)[-1])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = randomised(classifier())
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": source.state_dict(), "epoch": 3}, path)
    else:
        save_file(source.state_dict(), path)
    for given in (path, str(path), path.as_uri()):
        model = classifier()
        assert load_weights(model, given).ok
        torch.testing.assert_close(model.head.weight, source.head.weight)


def test_an_own_family_loads_its_own_keys() -> None:
    class Plain(Backbone):
        family = "plain"

        def __init__(self) -> None:
            stage = Stage(nn.Linear(3, 4), [nn.Linear(4, 4)])
            super().__init__([stage], in_chans=3, channels=[4], strides=[1], out_indices=[0])

    source, model = Classifier(randomised(Plain()), 5), Classifier(Plain(), 5)
    report = load_weights(model, {f"module.{key}": tensor for key, tensor in source.state_dict().items()})
    assert report.ok
    assert report.family == "plain"
    assert len(report.loaded) == len(model.state_dict())
    bare = Plain()
    assert load_weights(bare, source.state_dict()).dropped == ["head.weight", "head.bias"]
    with pytest.raises(WeightsError, match="family swin"):
        load_weights(bare, weights(swin()))


def test_a_missing_norm_of_pvt_v2_is_an_error() -> None:
    official = weights(pvt_v2())
    del official["norm1.weight"], official["norm1.bias"]
    with pytest.raises(WeightsError, match=r"stages.0.norm.weight, stages.0.norm.bias"):
        load_weights(pvt_v2(), official)


def test_the_report_is_a_short_table() -> None:
    text = str(load_weights(swin(window_size=3), weights(classifier())))
    lines = text.splitlines()
    assert lines[0] == "official checkpoint of the family swin"
    assert len(lines) == 6
    assert [line.split()[0] for line in lines[1:]] == ["loaded", "resized", "recomputed", "dropped", "initialised"]
    assert all(len(line) < 160 for line in lines)


def without(key: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {k: t for k, t in weights(classifier()).items() if not k.startswith(key)}


def changed(key: str, tensor: Tensor) -> Callable[[], dict[str, Tensor]]:
    return lambda: {**weights(classifier()), key: tensor}


KERNEL = "layers.0.blocks.0.mlp.fc1.weight"
BAD = {
    "missing": (without("layers.1.blocks.0.norm2"), "2 keys of the model.*backbone.stages.1.blocks.0.norm2.weight"),
    "missing head bias": (without("head.bias"), "1 keys of the model are missing .head.bias"),
    "unexpected": (changed("layers.0.gate.weight", torch.ones(1)), "1 keys have no place.*layers.0.gate.weight"),
    "unexpected block": (
        lambda: weights(classifier(depths=(2, 1, 5))),
        r"39 keys have no place.*depths \(2, 1, 5\) and 8 channels, the model has depths \(2, 1, 2\) and 8 channels",
    ),
    "wider": (
        lambda: weights(classifier(embed_dim=16)),
        r"tensors do not fit \(backbone.stages.0.downsample.proj.weight is \(16, 3, 4, 4\) in the weights, "
        r"\(8, 3, 4, 4\) in the model",
    ),
    "other patches": (lambda: weights(classifier(patch_size=2)), r"\(8, 3, 2, 2\) in the weights"),
    "other heads": (lambda: weights(classifier(num_heads=(2, 2, 2))), r"position_bias.table is \(49, 2\)"),
    "no bias": (lambda: weights(classifier(qkv_bias=False)), "5 keys of the model are missing.*attn.qkv.bias"),
    "extra embedding": (lambda: weights(classifier(ape_size=4)), "no place in the model .absolute_pos_embed"),
    "table of unknown window": (
        lambda: {
            key: torch.ones(27, t.shape[1]) if key.endswith("bias_table") else t
            for key, t in weights(classifier()).items()
        },
        r"position_bias.table is \(27, 1\)",
    ),
    "whole numbers": (changed(KERNEL, torch.ones(32, 8, dtype=torch.int8)), "is torch.int8 in the weights"),
    "other family": (lambda: weights(swinv2()), "family swinv2 .official layout., the model is a SwinTransformer"),
    "pvt": (lambda: weights(pvt_v2(), "mmdet"), "family pvt_v2 .mmdet layout., the model is a SwinTransformer"),
    "other network": (lambda: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(1)}, "conv1.weight, fc.bias"),
    "nothing": (lambda: {}, "no tensors"),
    "not a state dict": (lambda: {"epoch": 3}, "no tensors"),
    "no such file": (lambda: "no/such/file.pth", "no/such/file.pth"),
}


@pytest.mark.parametrize(("source", "message"), BAD.values(), ids=BAD.keys())
def test_errors_leave_the_model_as_it_was(source: Callable, message: str) -> None:
    model = randomised(classifier())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(model, source())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


CLASS_MAPS = {
    "length": ([1, 2], "class_map has 2 indices, the model 5 classes"),
    "range": ([0, 1, 2, 3, 7], "class_map names class 7, the head of the weights has 7, from 0"),
    "negative": ([0, 1, 2, 3, -1], "class_map names class -1"),
    "numbers": ([0.5, 1.0], r"class_map is \[0.5, 1.0\]: give a list of class indices"),
    "file": ("no/such/map.txt", "class_map no/such/map.txt"),
}


@pytest.mark.parametrize(("class_map", "message"), CLASS_MAPS.values(), ids=CLASS_MAPS.keys())
def test_wrong_class_maps(class_map, message: str) -> None:
    model = classifier(5)
    before = model.head.weight.clone()
    with pytest.raises(WeightsError, match=message):
        load_weights(model, weights(classifier(7)), class_map=class_map)
    assert torch.equal(model.head.weight, before)


def test_a_class_map_needs_two_heads() -> None:
    with pytest.raises(WeightsError, match="give a Classifier"):
        load_weights(swin(), weights(classifier(7)), class_map=[0])
    with pytest.raises(WeightsError, match="weights with a head"):
        load_weights(classifier(1), weights(swin()), class_map=[0])


def test_only_models_of_this_library() -> None:
    with pytest.raises(InputError, match="not a Linear"):
        load_weights(nn.Linear(1, 1), {})


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = swin()
    with pytest.raises(WeightsError, match="meta device"):
        load_weights(model, weights(swin()))
