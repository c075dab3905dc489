"""Twins: local windows with the official padding and mask, the position encoding, norms after stages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hvt_backbones as hvt
from hvt_backbones.layers.attention import SpatialReductionAttention
from hvt_backbones.twins import LocalAttention

from .families import randomise, tiny

both = pytest.mark.parametrize("family", ["twins_pcpvt", "twins_svt"])


@pytest.mark.parametrize(("size", "hides"), [((8, 8), False), ((7, 8), False), ((8, 9), False), ((7, 9), True)])
def test_padding_is_hidden_only_where_both_sides_need_it(size: tuple[int, int], hides: bool) -> None:
    plain = randomise(LocalAttention(6, 2, (4, 4))).double()
    masked = LocalAttention(6, 2, (4, 4), mask_padding=True).double()
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    assert torch.equal(plain(x), masked(x)) != hides


def test_local_and_global_attention_alternate() -> None:
    model = tiny("twins_svt", depths=(3, 2, 1, 2), window_sizes=(4, 4, 4, 2), mask_padding=True)
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.stages]
    assert kinds[0] == [LocalAttention, SpatialReductionAttention, LocalAttention]
    assert kinds[2] == [LocalAttention]
    assert [stage.blocks[0].attn.window_size for stage in model.stages] == [(4, 4), (4, 4), (4, 4), (2, 2)]
    assert all(stage.blocks[0].attn.mask_padding for stage in model.stages)
    for stage in tiny("twins_pcpvt").stages:
        assert {type(block.attn) for block in stage.blocks} == {SpatialReductionAttention}


@pytest.mark.parametrize(
    ("pad", "sides"), [(False, [(1, 18), (1, 9), (1, 4), (1, 2)]), (True, [(1, 19), (1, 10), (1, 5), (1, 3)])]
)
def test_a_map_of_one_row_keeps_it(pad: bool, sides: list[tuple[int, int]]) -> None:
    maps = tiny("twins_svt", pad_patches=pad)(torch.randn(2, 3, 4, 75))
    assert [tuple(x.shape[2:]) for x in maps] == sides


@both
def test_norms_follow_the_stages_that_are_named(family: str) -> None:
    def normed(model: hvt.Backbone) -> list[bool]:
        return [isinstance(stage.norm, nn.LayerNorm) for stage in model.stages]

    assert normed(tiny(family)) == [family == "twins_svt"] * 4
    assert normed(tiny(family, norm_after_stage=True)) == [True] * 4
    assert normed(tiny(family, norm_after_stage=(False, True, False, True), out_indices=(2,))) == [False, True, False]


def test_state_dict_keys() -> None:
    model = tiny("twins_svt")
    shared = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
    parts = [f"blocks.{j}.{part}" for j in (0, 1) for part in shared]
    parts += [f"blocks.1.attn.{part}" for part in ("q", "kv", "sr", "norm")]
    parts += ["blocks.0.position", "blocks.0.attn.qkv", "downsample.proj", "downsample.norm", "norm"]
    expected = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    state = model.state_dict()
    assert {key.removeprefix("stages.0.") for key in state if key.startswith("stages.0.")} == expected
    assert state["stages.0.blocks.0.position.weight"].shape == (8, 1, 3, 3)
    assert not any("attn.sr" in key for key in state if key.startswith("stages.3."))


def test_initial_values() -> None:
    block = hvt.TwinsSVT(out_indices=(0,)).stages[0].blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.position.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.15)
    assert not block.position.bias.any()


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("twins_pcpvt", {"sr_ratios": (8, 4)}, "2 of sr_ratios"),
        ("twins_pcpvt", {"norm_after_stage": (True, False)}, "2 of norm_after_stage"),
        ("twins_pcpvt", {"norm_after_stage": (3,)}, "True or False"),
        ("twins_pcpvt", {"num_heads": (1, 2, 5, 8)}, "stage 2 has 24 channels, which 5 heads"),
        ("twins_svt", {"window_sizes": (7, 7)}, "4 of depths, 2 of window_sizes"),
        ("twins_svt", {"window_sizes": (7, 7, 0, 7)}, "window_sizes is 0"),
        ("twins_svt", {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit(family: str, arguments: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        tiny(family, **arguments)
