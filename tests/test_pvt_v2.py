"""What is particular to PVTv2 and to the attention over a reduced map, beside the reference cases and the peers."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.layers.attention import SpatialReductionAttention

from .families import PYRAMID, randomise, tiny


@pytest.mark.parametrize("size", [(2, 9), (8, 3)])
def test_a_map_shorter_than_a_square_is_padded_to_it(size: tuple[int, int]) -> None:
    attn = randomise(SpatialReductionAttention(8, 2, sr_ratio=4))
    x = torch.randn(1, *size, 8)
    padded = F.pad(x, (0, 0, 0, max(4 - size[1], 0), 0, max(4 - size[0], 0)))
    torch.testing.assert_close(attn.reduce(x), attn.reduce(padded))
    assert attn(x).shape == x.shape


def test_training_keeps_no_more_activations_than_timm() -> None:
    arguments = {**PYRAMID, "depths": (2, 2, 2, 2), "mlp_ratios": (4, 4, 2, 2)}
    theirs = timm.models.pvt_v2.PyramidVisionTransformerV2(**arguments, num_classes=0)
    ours = hvt.PyramidVisionTransformerV2(**arguments, drop_path_rate=0.0, out_indices=(3,))
    x = torch.randn(1, 3, 96, 96)

    def kept(model: nn.Module) -> int:
        tensors: list[Tensor] = []  # held, so that no two of them get the same address
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            model(x)
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    assert kept(ours) <= kept(theirs) * 1.01


@pytest.mark.parametrize("linear", [False, True])
def test_state_dict_keys(linear: bool) -> None:
    keys = {f"{part}.{leaf}" for part in (
        "downsample.proj", "downsample.norm", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.attn.q", "blocks.0.attn.kv",
        "blocks.0.attn.proj", "blocks.0.attn.sr", "blocks.0.attn.norm", "blocks.0.mlp.fc1", "blocks.0.mlp.dwconv",
        "blocks.0.mlp.fc2", "norm",
    ) for leaf in ("weight", "bias")}  # fmt: skip
    state = tiny("pvt_v2", linear=linear, depths=(1, 1, 1, 1)).state_dict()
    assert {key.removeprefix("stages.0.") for key in state if key.startswith("stages.0.")} == keys
    reduces = {key for key in keys if "attn.sr" in key or "attn.norm" in key}
    last = keys if linear else keys - reduces  # only the linear variant reduces where sr_ratio is 1
    assert {key.removeprefix("stages.3.") for key in state if key.startswith("stages.3.")} == last
    assert state["stages.0.blocks.0.attn.sr.weight"].shape == ((8, 8, 1, 1) if linear else (8, 8, 8, 8))


def test_initial_values() -> None:
    one_stage = {"embed_dims": (64,), "depths": (2,), "num_heads": (1,), "mlp_ratios": (8,), "sr_ratios": (4,)}
    model = hvt.PyramidVisionTransformerV2(**one_stage, out_indices=(0,))
    block = model.stages[0].blocks[0]
    assert block.attn.q.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.attn.sr.weight.std().item() == pytest.approx(math.sqrt(2 / (16 * 64)), rel=0.1)
    assert block.mlp.dwconv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp_ratios": (4, 4)}, "4 of depths.*2 of mlp_ratios"),
        ({"embed_dims": (8, 16, 20)}, "3 of embed_dims"),
        ({"num_heads": (1, 3, 5, 8)}, "stage 1 has 16 channels, which 3 heads"),
        ({"sr_ratios": (8, 4, 0, 1)}, r"sr_ratios\[2\] is 0"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        tiny("pvt_v2", **arguments)
