"""What is particular to Swin and SwinV2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hvt_backbones as hvt
from hvt_backbones.layers.window_attention import LogPositionBias, WindowAttention

from .families import randomise, tiny


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


def test_a_new_v2_block_is_the_identity() -> None:
    model = hvt.SwinTransformerV2(embed_dim=8, depths=(2,), num_heads=(2,), out_indices=(0,))
    x = torch.randn(1, 32, 32, 3)
    torch.testing.assert_close(model.stages[0](x)[0], model.stages[0].downsample(x))


def test_further_norms_end_every_so_many_blocks_of_a_stage() -> None:
    arguments = {"embed_dim": 8, "depths": (4, 5), "num_heads": (1, 2), "window_size": 4, "out_indices": (1,)}
    arguments |= {"drop_path_rate": 0.0, "extra_norm_every_n_blocks": 2, "norm_eps": 1e-3}
    model = hvt.SwinTransformerV2(**arguments)
    normed = [[block.norm3 is not None for block in stage.blocks] for stage in model.stages]
    assert normed == [[False, True, False, True], [False, True, False, True, False]]
    block, x = randomise(model.stages[1].blocks[3]), torch.randn(2, 8, 8, 16)
    out = block(x)
    norm, block.norm3 = block.norm3, None
    expected = F.layer_norm(block(x), (16,), norm.weight, norm.bias, eps=1e-3)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_absolute_position_embedding_is_resized_to_the_grid() -> None:
    model = tiny("swin", ape_size=(8, 6))
    exact = torch.zeros(1, 8, 6, 8)
    torch.testing.assert_close(model.embed(exact), model.absolute_pos_embed)
    other = model.embed(torch.zeros(1, 5, 9, 8))
    expected = F.interpolate(model.absolute_pos_embed.permute(0, 3, 1, 2), (5, 9), mode="bicubic")
    torch.testing.assert_close(other, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 2, 2)}, "depths"),
        ({"num_heads": (1, 3, 4, 4)}, "stage 1 has 16 channels, which 3 heads"),
        ({"small_map": "crop"}, "small_map is 'crop': choose one of pad, shrink"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"window_size": (4, 4, 4)}, "window_size"),
        ({"extra_norm_every_n_blocks": -1}, "extra_norm_every_n_blocks is -1: give a whole number, 0 for none"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        tiny("swinv2" if "extra_norm_every_n_blocks" in change else "swin", **change)
