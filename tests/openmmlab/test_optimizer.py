"""Learning rates and weight decay of every parameter of a detector."""

from __future__ import annotations

from collections import Counter

import pytest
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import nn

import hvt_backbones as hvt
from hvt_backbones.openmmlab import HVTBackbone
from runner.patches import import_framework

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
    ours, theirs = (counted(family, keys, ours=ours) for ours in (True, False))
    assert ours == theirs
    assert len(ours) > 2


def counted(family: str, keys: dict[str, dict], *, ours: bool, detr: bool = False) -> Counter:
    """(learning rate, weight decay) -> numbers that have them, in a model with either backbone."""
    model, counts = build("fpn" if family.startswith("twins") else "retinanet", family, ours=ours), Counter()
    if detr:
        model.encoder = transformer()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, values in settings(model, paramwise_cfg={"custom_keys": keys}).items():
        counts[values] += sizes[name]
    return counts


def transformer() -> nn.Module:
    """A part of a detector with names that backbones have, too."""
    from mmdet.models.layers import DetrTransformerEncoder

    config = {"self_attn_cfg": {"embed_dims": 8, "num_heads": 2}, "ffn_cfg": {"embed_dims": 8}}
    encoder = DetrTransformerEncoder(num_layers=1, layer_cfg=config)
    encoder.patch_embed, encoder.w_msa, encoder.norm3 = nn.Linear(8, 9), nn.Linear(8, 10), nn.LayerNorm(8)
    return encoder


@pytest.mark.parametrize(
    ("family", "key"),
    [
        *(("swin", key) for key in ("ffn", "norm3", "layers.0", "patch_embed", "w_msa", "attn", "ffn.layers.1")),
        *((family, key) for family in ("pvt_v2", "twins_svt") for key in ("ffn", "layers.0", "attn")),
    ],
)
def test_keys_that_fit_another_part_of_the_model_too(family: str, key: str) -> None:
    ours, theirs = (counted(family, {key: {"lr_mult": 2.0}}, ours=ours, detr=True) for ours in (True, False))
    assert ours == theirs
    assert ours[0.2, 0.05]


@pytest.mark.parametrize("key", ["downsample", "stages.0.downsample", "stages.1", "norm1", "backbone.stages.0"])
def test_keys_that_mean_other_layers_in_our_names(key: str) -> None:
    """Swin of mmdetection has its merging at the end of a stage, and the norms of its outputs beside the stages."""
    keys = {key: {"lr_mult": 2.0}, "norm": {"decay_mult": 0.0}}
    assert counted("swin", keys, ours=True) == counted("swin", keys, ours=False)


def test_keys_in_our_full_names_are_ours() -> None:
    model = build("retinanet", "swin", ours=True)
    for key in ("model.stages.1", "backbone.model.stages.1"):
        found = settings(model, paramwise_cfg={"custom_keys": {key: {"lr_mult": 2.0}}})
        doubled = {name for name, values in found.items() if values == (0.2, 0.05)}
        assert doubled == {name for name in found if "stages.1." in name}


def test_a_rule_keeps_the_others_off_only_where_it_holds() -> None:
    """Of a parameter that a key no longer means, MMEngine's rules for norms and biases hold."""
    rules = {"custom_keys": {"stages.0.downsample": {"lr_mult": 2.0}}, "norm_decay_mult": 0.0, "bias_decay_mult": 0.0}
    found = settings(build("retinanet", "swin", ours=True), paramwise_cfg=rules)
    start = "backbone.model.stages"
    assert found[f"{start}.0.downsample.norm.weight"] == found[f"{start}.0.downsample.proj.bias"] == (0.1, 0.0)
    assert found[f"{start}.1.downsample.norm.weight"] == (0.2, 0.05)


def test_where_names_disagree_it_is_said(caplog) -> None:
    model, logger = build("retinanet", "swin", ours=True), MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        for key, said in (("downsample", True), ("norm", False), ("relative_position_bias_table", False)):
            caplog.clear()
            settings(model, paramwise_cfg={"custom_keys": {key: {"lr_mult": 2.0}}})
            assert ("'downsample' is taken for what mmdet names so, 9 parameters; for the 13" in caplog.text) == said
            assert ("is taken for" in caplog.text) == said
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8", "video_swin_tiny"])
def test_the_documented_keys_are_ours_in_every_family(name: str) -> None:
    model = nn.ModuleDict({"backbone": HVTBackbone(name, depths=(2, 2))})
    for key in ("absolute_pos_embed", "position_bias", "logit_scale", "norm", "position"):
        found = settings(model, paramwise_cfg={"custom_keys": {key: {"lr_mult": 2.0}}})
        assert {name for name, (lr, _) in found.items() if lr == 0.2} == {name for name in found if key in name}


def test_keys_that_name_nothing_of_the_backbone_are_refused() -> None:
    model = build("retinanet", "swin", ours=True)
    with pytest.raises(hvt.InputError, match=r"backbone\.layers\.9.*'backbone\.model\.stages"):
        settings(model, paramwise_cfg={"custom_keys": {"backbone.layers.9": {"lr_mult": 0.1}}})


def test_keys_of_mmactions_own_constructor() -> None:
    import_framework("mmaction")
    model = build("retinanet", "swin", ours=True)
    rules = {"w_msa": {"lr_mult": 0.5}, "relative_position_bias_table": {"decay_mult": 0.0}, "attn": {"lr_mult": 0.1}}
    found = settings(model, constructor="mmaction.SwinOptimWrapperConstructor", paramwise_cfg=rules)
    block = "backbone.model.stages.0.blocks.0"
    assert found[f"{block}.attn.position_bias.table"] == pytest.approx((0.005, 0.0))
    assert found[f"{block}.attn.qkv.weight"] == pytest.approx((0.005, 0.05))
    assert found[f"{block}.mlp.fc1.weight"] == (0.1, 0.05)
