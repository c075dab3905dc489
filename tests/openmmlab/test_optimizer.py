"""Learning rates and weight decay of every parameter of a detector."""

from __future__ import annotations

from collections import Counter

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

import hvt_backbones as hvt
from video.shims import prepare_imports as prepare_mmaction

from .models import BACKBONES, build

ADAMW = {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05}


def settings(model: nn.Module, **config) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay) in the optimiser that MMEngine builds."""
    optimizer = build_optim_wrapper(model, {"type": "OptimWrapper", "optimizer": ADAMW, **config}).optimizer
    groups = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups) == len(trained)
    return {name: groups[parameter] for name, parameter in trained.items()}


def layer_decay(**paramwise) -> dict:
    return {"constructor": "HVTLayerDecayOptimWrapperConstructor", "paramwise_cfg": paramwise}


@pytest.mark.parametrize("family", BACKBONES)
def test_layer_decay(family: str) -> None:
    model = build("retinanet", family, ours=True, frozen_stages=0)
    found = settings(model, **layer_decay(layer_decay_rate=0.5))
    backbone = {name: values for name, values in found.items() if name.startswith("backbone.")}
    wanted = {
        parameter: (group["lr"], group["weight_decay"])
        for group in model.backbone.model.param_groups(lr=0.1, weight_decay=0.05, layer_decay=0.5)
        for parameter in group["params"]
    }
    assert backbone == {name: wanted[p] for name, p in model.named_parameters() if p in wanted}
    # 8 blocks: the patch embedding, layer 0, is frozen
    assert sorted({lr for lr, _ in backbone.values()}) == [0.1 * 0.5**layer for layer in range(7, -1, -1)]
    rest = {name: values for name, values in found.items() if name not in backbone}
    assert {lr for lr, _ in rest.values()} == {0.1}
    assert rest["bbox_head.retina_cls.weight"] == (0.1, 0.05)
    assert rest["bbox_head.retina_cls.bias"] == (0.1, 0.0)


def test_rules_of_mmengine_beside_layer_decay() -> None:
    model = build("retinanet", "swin", ours=True)
    keys = {"bbox_head": {"lr_mult": 10.0}, "stages.3": {"lr_mult": 2.0, "decay_mult": 3.0}}
    found = settings(model, **layer_decay(layer_decay_rate=0.5, custom_keys=keys, bias_decay_mult=0.5))
    assert found["bbox_head.retina_cls.weight"] == pytest.approx((1.0, 0.05))
    assert found["backbone.model.stages.3.blocks.1.mlp.fc1.weight"] == pytest.approx((0.2, 0.15))
    assert found["backbone.model.stages.3.blocks.0.mlp.fc1.weight"] == pytest.approx((0.1, 0.15))
    assert found["backbone.model.stages.2.blocks.1.mlp.fc1.bias"] == pytest.approx((0.025, 0.025))


def test_layer_decay_needs_its_rate() -> None:
    model = build("retinanet", "swin", ours=True)
    for paramwise in ({}, {"layer_decay_rate": 0}, {"layer_decay_rate": "0.9"}, {"decay_rate": 0.9}):
        with pytest.raises(hvt.InputError, match="paramwise_cfg needs layer_decay_rate"):
            settings(model, **layer_decay(**paramwise))
    with pytest.raises(hvt.InputError, match="there is none"):
        settings(build("retinanet", "swin", ours=False), **layer_decay(layer_decay_rate=0.9))


def test_groups_are_few() -> None:
    model = build("retinanet", "swin", ours=True)
    config = {"type": "OptimWrapper", "optimizer": ADAMW, **layer_decay(layer_decay_rate=0.5)}
    # 8 blocks and the embedding, each with and without decay; the rest shares the groups of the last block
    assert len(build_optim_wrapper(model, config).optimizer.param_groups) == 18


@pytest.mark.parametrize("family", BACKBONES)
def test_the_keys_of_the_official_configurations(family: str) -> None:
    """MMEngine's own constructor with the keys that the adapter's documentation names."""
    keys = ("absolute_pos_embed", "position_bias", "logit_scale", "norm")
    model = build("retinanet", family, ours=True)
    found = settings(model, paramwise_cfg={"custom_keys": {key: {"decay_mult": 0.0} for key in keys}})
    spared = {name for name, (_, decay) in found.items() if decay == 0}
    norms = {
        f"{name}.{p}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for p in ("weight", "bias")
    }
    tables = {name for name in found if name.endswith("position_bias.table")}
    assert spared == norms | tables
    assert len(tables) == (8 if family == "swin" else 0)


@pytest.mark.parametrize("family", BACKBONES)
def test_keys_in_the_names_of_a_frameworks_own_backbone(family: str) -> None:
    keys = {
        "relative_position_bias_table": {"decay_mult": 0.0},
        "position_encodings": {"decay_mult": 0.0},
        "absolute_pos_embed": {"decay_mult": 0.0},
        "w_msa": {"decay_mult": 0.5},
        "ffn": {"lr_mult": 2.0},
        "backbone.": {"lr_mult": 0.1},
        "ffn.layers.1": {"lr_mult": 3.0},
    }
    elements, method = [], "fpn" if family.startswith("twins") else "retinanet"
    for ours in (True, False):
        model, counted = build(method, family, ours=ours), Counter()
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        for name, values in settings(model, paramwise_cfg={"custom_keys": keys}).items():
            counted[values] += sizes[name]
        elements.append(counted)
    assert elements[0] == elements[1]
    assert len(elements[0]) > 2


def test_keys_that_name_nothing_of_the_backbone_are_refused() -> None:
    model = build("retinanet", "swin", ours=True)
    with pytest.raises(hvt.InputError, match=r"backbone\.layers\.9.*'backbone\.model\.stages"):
        settings(model, paramwise_cfg={"custom_keys": {"backbone.layers.9": {"lr_mult": 0.1}}})


def test_keys_of_mmactions_own_constructor() -> None:
    prepare_mmaction()
    model = build("retinanet", "swin", ours=True)
    rules = {"relative_position_bias_table": {"decay_mult": 0.0}, "backbone": {"lr_mult": 0.1}}
    found = settings(model, constructor="mmaction.SwinOptimWrapperConstructor", paramwise_cfg=rules)
    tables = [values for name, values in found.items() if "position_bias.table" in name]
    assert tables == [pytest.approx((0.01, 0.0))] * 8
