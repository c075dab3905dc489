"""What is particular to Swin and SwinV2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.layers.patch import PatchEmbed, PatchMerging
from hvt_backbones.layers.window_attention import LogPositionBias, RelativePositionBias, WindowAttention

from .families import randomise, tiny


def merge_by_slicing(x: Tensor, module: PatchMerging) -> Tensor:
    x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
    x = torch.cat([x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)], dim=-1)
    return module.norm(module.reduction(x)) if module.post_norm else module.reduction(module.norm(x))


SHAPES = {"even": (2, 4, 6, 8), "odd_height": (1, 5, 4, 8), "odd_both": (1, 7, 3, 8), "clip": (2, 3, 5, 4, 8)}


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_patch_merging_matches_slicing(shape: tuple[int, ...], post_norm: bool) -> None:
    module = randomise(PatchMerging(shape[-1], post_norm=post_norm).double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    outputs = module(x), merge_by_slicing(x, module)
    torch.testing.assert_close(*outputs)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in outputs))


@pytest.mark.parametrize("size", [(8, 12), (5, 9), (3, 2)], ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-3])
def test_patch_embedding_matches_a_product_over_unfolded_patches(size: tuple[int, int], norm_eps: float | None) -> None:
    module = randomise(PatchEmbed(3, 6, (4, 2), norm_eps=norm_eps).double())
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours = module(images.movedim(1, -1))
    padded = F.pad(images, (0, -size[1] % 2, 0, -size[0] % 4))
    columns = F.unfold(padded, (4, 2), stride=(4, 2)).mT
    theirs = F.linear(columns, module.proj.weight.flatten(1), module.proj.bias)
    theirs = module.norm(theirs).unflatten(1, (padded.shape[2] // 4, padded.shape[3] // 2))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    leaves = [images, *module.parameters()]
    torch.testing.assert_close(
        *(torch.autograd.grad(y.pow(3).sum(), leaves) for y in (ours, theirs)), rtol=1e-9, atol=1e-10
    )


def test_a_smaller_window_uses_the_rows_of_the_same_offsets() -> None:
    bias = randomise(RelativePositionBias((5, 4), 2))
    cpu = torch.device("cpu")
    whole, part = bias((5, 4), cpu).view(2, 5, 4, 5, 4), bias((3, 2), cpu).view(2, 3, 2, 3, 2)
    torch.testing.assert_close(part, whole[:, :3, :2, :3, :2])


def test_relative_position_bias_depends_on_the_offset_alone() -> None:
    window = (2, 3, 2)
    bias = randomise(RelativePositionBias(window, 1))
    tokens = torch.cartesian_prod(*(torch.arange(side) for side in window))
    by_offset: dict[tuple, float] = {}
    for i, row in enumerate(bias(window, tokens.device)[0].tolist()):
        for j, value in enumerate(row):
            assert by_offset.setdefault(tuple((tokens[i] - tokens[j]).tolist()), value) == value
    assert len(by_offset) == len(set(by_offset.values())) == bias.table.shape[0]


def test_log_position_bias_is_divided_by_the_window_of_pretraining() -> None:
    trained = randomise(LogPositionBias((4, 4), 2, (0, 0)))
    moved = LogPositionBias((7, 7), 2, (4, 4))
    moved.load_state_dict(trained.state_dict())
    cpu = torch.device("cpu")
    torch.testing.assert_close(
        moved((7, 7), cpu).view(2, 7, 7, 7, 7)[:, :4, :4, :4, :4], trained((4, 4), cpu).view(2, 4, 4, 4, 4)
    )
    assert trained((4, 4), cpu).max() <= 16


def test_a_position_network_without_parameters_has_the_type_of_the_map() -> None:
    """FSDP of flattened parameters leaves plain tensors in their places."""
    bias, given = LogPositionBias((4, 4), 2, (0, 0)).bfloat16(), ((4, 4), torch.device("cpu"), torch.bfloat16)
    expected = bias(*given)
    for layer, name in ((bias.mlp[0], "weight"), (bias.mlp[0], "bias"), (bias.mlp[2], "weight")):
        value = getattr(layer, name).detach()
        delattr(layer, name)
        setattr(layer, name, value)
    assert torch.equal(bias(*given), expected)


def test_a_model_without_hidden_units() -> None:
    with pytest.raises(hvt.InputError, match=r"mlp_ratio 0\.001 leaves no hidden unit for 96 channels"):
        hvt.create_backbone("swin_tiny", mlp_ratio=0.001)


@pytest.mark.parametrize(
    ("small_map", "size", "window", "shift"),
    [
        ("pad", (3, 9), (4, 4), (2, 2)),
        ("shrink", (9, 9), (4, 4), (2, 2)),
        ("shrink", (4, 9), (4, 4), (0, 0)),
        ("shrink", (3, 9), (3, 3), (0, 0)),
    ],
)
def test_small_maps(small_map: str, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> None:
    attention = WindowAttention(8, 2, (4, 4), shifted=True, small_map=small_map, qkv_bias=True)
    assert attention.fit_window(size) == (window, shift)


def test_shrink_equals_a_model_built_with_the_smaller_window() -> None:
    """The official V2 classifier built for a small image has small windows; one of ours serves all sizes."""
    large = tiny("swinv2", window_size=8, small_map="shrink").eval()
    small = tiny("swinv2", window_size=(8, 4, 2, 1), small_map="shrink").eval()
    small.load_state_dict(large.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(large(x), small(x))


def test_logit_scale_is_clamped() -> None:
    model = tiny("swinv2").eval()
    x = torch.randn(1, 3, 40, 40)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            parameter.data.fill_(5.0)
    first = model(x)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            parameter.data.fill_(50.0)
    torch.testing.assert_close(first, model(x))


def test_a_new_v2_block_is_the_identity() -> None:
    model = hvt.SwinTransformerV2(embed_dim=8, depths=(2,), num_heads=(2,), out_indices=(0,))
    x = torch.randn(1, 32, 32, 3)
    torch.testing.assert_close(model.stages[0](x)[0], model.stages[0].downsample(x))


def test_absolute_position_embedding_is_resized_to_the_grid() -> None:
    model = tiny("swin", ape_size=(8, 6))
    exact = torch.zeros(1, 8, 6, 8)
    torch.testing.assert_close(model.embed(exact), model.absolute_pos_embed)
    other = model.embed(torch.zeros(1, 5, 9, 8))
    expected = F.interpolate(model.absolute_pos_embed.permute(0, 3, 1, 2), (5, 9), mode="bicubic")
    torch.testing.assert_close(other, expected.permute(0, 2, 3, 1))


def test_dropout_acts_in_training_only() -> None:
    model = tiny("swin", drop_rate=0.3, attn_drop_rate=0.3)
    x = torch.randn(1, 3, 40, 40)
    assert not torch.allclose(model.train()(x)[0], model(x)[0])
    torch.testing.assert_close(model.eval()(x)[0], model(x)[0])
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.3 for m in model.modules()) == 1 + 7 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 2, 2)}, "depths"),
        ({"num_heads": (1, 3, 4, 4)}, "stage 1 has 16 channels, which 3 heads"),
        ({"small_map": "crop"}, "small_map is 'crop': choose one of pad, shrink"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"window_size": (4, 4, 4)}, "window_size"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        tiny("swin", **change)
