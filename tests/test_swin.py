"""What is particular to Swin and SwinV2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import hvt_backbones as hvt
from hvt_backbones.layers.window_attention import LogPositionBias, WindowAttention

from .families import images, randomise, tiny


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


def swapped(name: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter of a model whose windows are (a, b), for one whose windows are (b, a)."""
    if name.endswith("downsample.proj.weight"):
        return value.mT
    if name.endswith("position_bias.table"):
        return value.view(2 * SIDES[0] - 1, 2 * SIDES[1] - 1, -1).transpose(0, 1).flatten(0, 1)
    if name.endswith("position_bias.mlp.0.weight"):
        return value.flip(1)
    merged = value.shape[-1] == 32 and ".downsample." in name  # four cells of 8 channels, column by column
    if merged and ("reduction" in name or ("downsample.norm" in name and len(value) == 32)):
        return value.unflatten(-1, (2, 2, 8)).transpose(-3, -2).flatten(-3)
    return value


SIDES = (3, 5)


@pytest.mark.parametrize("small_map", ["pad", "shrink"])
@pytest.mark.parametrize("size", [(96, 160), (72, 88), (20, 130), (9, 40)])
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_windows_that_differ_by_axis(family: str, size: tuple[int, int], small_map: str) -> None:
    """Rows and columns swapped in images, windows and weights are swapped in the maps, which differ otherwise."""
    arguments = {"depths": (2, 2), "num_heads": (1, 2), "out_indices": (0, 1), "small_map": small_map}
    model = tiny(family, window_size=SIDES, **arguments).double().eval()
    twin = tiny(family, window_size=SIDES[::-1], **arguments).double().eval()
    twin.load_state_dict({name: swapped(name, value) for name, value in model.state_dict().items()})
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    for ours, theirs in zip(model(x), twin(x.mT), strict=True):
        torch.testing.assert_close(ours, theirs.mT, rtol=1e-10, atol=1e-10)
    same = tiny(family, window_size=SIDES, **arguments).double().eval()
    assert not torch.allclose(same(x.mT)[1].mT, model(x)[1])


@pytest.mark.parametrize(
    ("size", "window"),
    [((64, 128), (4, 8)), ((64, 128), (8, 16)), ((48, 96), (6, 4)), ((64, 64), (4, 8))],
    ids=str,
)
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_classifiers_whose_windows_differ_by_axis_are_timms(family: str, size: tuple[int, int], window: tuple) -> None:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    shape = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    theirs = {"swin": SwinTransformer, "swinv2": SwinTransformerV2}[family]
    peer = theirs(img_size=size, window_size=window, **shape, num_classes=5, drop_path_rate=0.0)
    peer = randomise(peer).double().eval()
    backbone = tiny(family, window_size=window, small_map="shrink", out_indices=(1,), **shape)
    model = hvt.Classifier(backbone, 5).double().eval()
    assert not hvt.load_weights(model, peer.state_dict()).resized
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-8, atol=1e-8)  # SwinV2's offsets are float32


def test_tables_of_oblong_windows_are_resized_to_windows_of_their_shape() -> None:
    shape = {"depths": (1,), "num_heads": (2,), "out_indices": (0,)}
    name = "stages.0.blocks.0.attn.position_bias.table"

    def loaded(given: tuple[int, int], own: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, str]:
        weights, model = tiny("swin", window_size=given, **shape).state_dict(), tiny("swin", window_size=own, **shape)
        model.state_dict()[name].zero_()
        report = hvt.load_weights(model, weights)
        return weights[name], model.state_dict()[name], str(report)

    for given, own in (((2, 4), (4, 8)), ((6, 4), (3, 2)), ((4, 4), (3, 6))):
        old, new, report = loaded(given, own)
        image = old.T.unflatten(1, [2 * side - 1 for side in given])[None]
        expected = F.interpolate(image, [2 * side - 1 for side in own], mode="bicubic").flatten(2)[0].T
        torch.testing.assert_close(new, expected)
        assert f"window {given[0]}x{given[1]} to {own[0]}x{own[1]}" in report
    with pytest.raises(hvt.WeightsError, match="position_bias.table is .21, 2. in the weights, .121, 2. in the model"):
        loaded((2, 4), (6, 6))


@pytest.mark.parametrize("family", ["swin", "swinv2", "video_swin"])
def test_outputs_after_the_downsampling(family: str) -> None:
    """As mmpretrain's and mmaction2's `out_after_downsample`: the norm is of the merged map, and the last has none."""
    model = tiny(family, out_after_downsample=True).eval()
    assert (model.channels, model.strides, model.num_features) == ((16, 32, 64, 64), (8, 16, 32, 32), 64)
    x = images(family, 60, 83)
    maps, merged = model(x), []
    hooks = [stage.downsample.register_forward_hook(lambda *a: merged.append(a[-1])) for stage in model.stages[1:]]
    assert len(model(x)) == 4
    for hook in hooks:
        hook.remove()
    for i in range(3):
        norm = model.stages[i].norm
        expected = F.layer_norm(merged[i], (model.channels[i],), norm.weight, norm.bias)
        torch.testing.assert_close(maps[i].movedim(1, -1), expected)
    part = tiny(family, out_after_downsample=True, out_indices=(1,))
    assert (part.channels, part.strides, len(part.stages), len(part.stages[2].blocks)) == ((32,), (16,), 3, 0)
    assert hvt.load_weights(part, model.state_dict()).dropped
    torch.testing.assert_close(part.eval()(x)[0], maps[1])
    part(x)[0].sum().backward()
    assert all(p.grad is not None for p in part.parameters()), "a parameter that no output uses breaks DDP"
    layers = dict(part.layer_ids())
    assert layers["stages.2.downsample.reduction.weight"] == layers["stages.1.norm.weight"] == 4
    part.freeze_stages(2)
    assert {name.split(".")[1] for name, p in part.named_parameters() if p.requires_grad} == {"2"}
    with pytest.raises(hvt.InputError, match="out_after_downsample is 1: give True or False"):
        tiny(family, out_after_downsample=1)
