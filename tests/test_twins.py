"""Twins: local windows with the official padding and mask, the position encoding, norms after stages."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.layers.attention import SpatialReductionAttention
from hvt_backbones.twins import LocalAttention

from .families import randomise

TINY = {
    "embed_dims": (8, 16, 20, 32),
    "depths": (2, 2, 1, 2),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (4, 4, 3, 2),
    "sr_ratios": (8, 4, 2, 1),
}
WINDOWS = {hvt.TwinsPCPVT: {}, hvt.TwinsSVT: {"window_sizes": (4, 4, 4, 2)}}
both = pytest.mark.parametrize("cls", WINDOWS, ids=["pcpvt", "svt"])


def tiny(cls: type[hvt.Backbone], **arguments) -> hvt.Backbone:
    return randomise(cls(**{"drop_path_rate": 0.0, **TINY, **WINDOWS[cls], **arguments})).double()


def images(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64)


def attend_by_hand(x: Tensor, attn: LocalAttention, window: tuple[int, int]) -> Tensor:
    """Window by window; the mask as the official segmentation code marks it, slices of -0 included."""
    height, width, dim = x.shape[1:]
    below, right = -height % window[0], -width % window[1]
    qkv = attn.qkv(F.pad(x, (0, 0, 0, right, 0, below)))  # zero tokens, so they carry the bias
    mark = torch.zeros(height + below, width + right)
    if attn.mask_padding:
        mark[-below:] = 1
        mark[:, -right:] = 1
    out = torch.zeros_like(qkv[..., :dim])
    for top in range(0, height + below, window[0]):
        for left in range(0, width + right, window[1]):
            rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
            q, k, v = qkv[:, rows, columns].flatten(1, 2).split(dim, dim=-1)
            marks = mark[rows, columns].flatten()
            mask = (marks[None] != marks[:, None]) * -1000.0
            heads = [
                (q[..., c] @ k[..., c].mT / math.sqrt(len(c)) + mask).softmax(-1) @ v[..., c]
                for c in torch.arange(dim).chunk(attn.num_heads)
            ]
            out[:, rows, columns] = torch.cat(heads, dim=-1).unflatten(1, window)
    return attn.proj(out[:, :height, :width])


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(
    ("size", "window"), [((8, 12), (4, 4)), ((7, 12), (4, 4)), ((8, 9), (4, 4)), ((7, 9), (4, 4)), ((2, 3), (7, 7)),
                         ((1, 1), (7, 7)), ((5, 7), (2, 3))],
)  # fmt: skip
def test_local_attention_matches_the_formula(
    size: tuple[int, int], window: tuple[int, int], qkv_bias: bool, mask_padding: bool
) -> None:
    attn = randomise(LocalAttention(6, 2, window, mask_padding=mask_padding, qkv_bias=qkv_bias)).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *attn.parameters()]
    ours, theirs = attn(x), attend_by_hand(x, attn, window)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("size", "hides"), [((8, 8), False), ((7, 8), False), ((8, 9), False), ((7, 9), True)])
def test_padding_is_hidden_only_where_both_sides_need_it(size: tuple[int, int], hides: bool) -> None:
    plain = randomise(LocalAttention(6, 2, (4, 4))).double()
    masked = LocalAttention(6, 2, (4, 4), mask_padding=True).double()
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(1, *size, 6, dtype=torch.float64)
    assert torch.equal(plain(x), masked(x)) != hides


def test_local_and_global_attention_alternate() -> None:
    model = tiny(hvt.TwinsSVT, depths=(3, 2, 1, 2), mask_padding=True)
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.stages]
    assert kinds[0] == [LocalAttention, SpatialReductionAttention, LocalAttention]
    assert kinds[2] == [LocalAttention]
    assert [stage.blocks[0].attn.window_size for stage in model.stages] == [(4, 4), (4, 4), (4, 4), (2, 2)]
    assert all(stage.blocks[0].attn.mask_padding for stage in model.stages)
    for stage in tiny(hvt.TwinsPCPVT).stages:
        assert {type(block.attn) for block in stage.blocks} == {SpatialReductionAttention}


@both
def test_position_is_added_once_per_stage_after_the_first_block(cls: type[hvt.Backbone]) -> None:
    model = tiny(cls)
    for stage in model.stages:
        assert [block.position is not None for block in stage.blocks] == [True] + [False] * (len(stage.blocks) - 1)
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 5, 6, 8, dtype=torch.float64)
    x1 = x + block.attn(block.norm1(x))
    x2 = x1 + block.mlp(block.norm2(x1))
    kernel = block.position.weight
    expected = x2 + F.conv2d(x2.movedim(-1, 1), kernel, block.position.bias, padding=1, groups=8).movedim(1, -1)
    torch.testing.assert_close(block(x), expected)


@both
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_matches_timm(cls: type[hvt.Backbone], size: tuple[int, int]) -> None:
    wss = WINDOWS[cls].get("window_sizes")
    theirs = timm.models.twins.Twins(img_size=size, **TINY, wss=wss, num_classes=0).double().eval()
    last = (False, False, False, True)
    ours = tiny(cls, norm_after_stage=last).eval()
    state = {}
    for key, value in ours.state_dict().items():
        _, stage, part, rest = key.split(".", 3)
        if part == "norm":
            key = f"norm.{rest}"
        elif part == "downsample":
            key = f"patch_embeds.{stage}.{rest}"
        elif ".position." in f".{rest}":
            key = f"pos_block.{stage}.proj.0.{rest.rpartition('.')[2]}"
        else:
            key = f"blocks.{stage}.{rest}"
        state[key] = value
    theirs.load_state_dict(state)
    x = images(*size)
    final, expected = theirs.forward_intermediates(x)
    expected[-1] = final.mT.reshape(expected[-1].shape)  # its last map is returned before the norm
    for our_map, their_map in zip(ours(x), expected, strict=True):
        torch.testing.assert_close(our_map, their_map, rtol=1e-9, atol=1e-10)


@both
def test_norms_follow_the_stages_that_are_named(cls: type[hvt.Backbone]) -> None:
    def normed(model: hvt.Backbone) -> list[bool]:
        return [isinstance(stage.norm, nn.LayerNorm) for stage in model.stages]

    assert normed(tiny(cls)) == [cls is hvt.TwinsSVT] * 4
    assert normed(tiny(cls, norm_after_stage=True)) == [True] * 4
    assert normed(tiny(cls, norm_after_stage=(False, True, False, True), out_indices=(2,))) == [False, True, False]
    for wrong in ((3,), (True, False), 1):
        with pytest.raises((hvt.InputError, TypeError)):
            tiny(cls, norm_after_stage=wrong)


def test_norms_feed_the_next_stage() -> None:
    model = tiny(hvt.TwinsSVT)
    x = images(64, 64)
    first, second = model(x)[:2]
    torch.testing.assert_close(model.stages[1](first.movedim(1, -1))[1], second.movedim(1, -1))


@both
@pytest.mark.parametrize(
    ("size", "pad", "sides"),
    [
        ((33, 47), False, [(8, 11), (4, 5), (2, 2), (1, 1)]),
        ((33, 47), True, [(9, 12), (5, 6), (3, 3), (2, 2)]),
        ((76, 72), False, [(19, 18), (9, 9), (4, 4), (2, 2)]),
        ((76, 72), True, [(19, 18), (10, 9), (5, 5), (3, 3)]),
        ((32, 32), False, [(8, 8), (4, 4), (2, 2), (1, 1)]),
        ((4, 75), False, [(1, 18), (1, 9), (1, 4), (1, 2)]),
    ],
)
def test_any_size(cls: type[hvt.Backbone], size: tuple[int, int], pad: bool, sides: list[tuple[int, int]]) -> None:
    model = tiny(cls, pad_patches=pad)
    maps = model(images(*size))
    assert [tuple(x.shape[2:]) for x in maps] == sides
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@both
def test_every_parameter_learns(cls: type[hvt.Backbone]) -> None:
    model = tiny(cls, in_chans=2)
    sum((x * torch.randn_like(x)).sum() for x in model(torch.randn(2, 2, 96, 96, dtype=torch.float64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


@both
def test_what_fills_no_patch_is_dropped(cls: type[hvt.Backbone]) -> None:
    model, x = tiny(cls).eval(), images(67, 50)
    for ours, cropped in zip(model(x), model(x[:, :, :64, :48]), strict=True):
        torch.testing.assert_close(ours, cropped)
    padded = tiny(cls, pad_patches=True).eval()
    whole = padded(F.pad(x, (0, 2, 0, 1)))
    torch.testing.assert_close(padded(x)[0], whole[0])


@both
def test_eps_differs_between_norms(cls: type[hvt.Backbone]) -> None:
    def eps(model: nn.Module, *ends: str) -> set[float]:
        return {m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and name.endswith(ends)}

    model = tiny(cls, norm_after_stage=True)
    assert eps(model, "norm1", "norm2", *(f"stages.{i}.norm" for i in range(4))) == {1e-6}
    assert eps(model, "downsample.norm", "attn.norm") == {1e-5}
    assert eps(tiny(cls, sr_norm_eps=1e-6), "attn.norm") == {1e-6}


def test_state_dict_keys() -> None:
    model = tiny(hvt.TwinsSVT)
    shared = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
    parts = [f"blocks.{j}.{part}" for j in (0, 1) for part in shared]
    parts += [f"blocks.1.attn.{part}" for part in ("q", "kv", "sr", "norm")]
    parts += ["blocks.0.position", "blocks.0.attn.qkv", "downsample.proj", "downsample.norm", "norm"]
    expected = {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    state = model.state_dict()
    assert {key.removeprefix("stages.0.") for key in state if key.startswith("stages.0.")} == expected
    assert state["stages.0.blocks.0.position.weight"].shape == (8, 1, 3, 3)
    assert not any("attn.sr" in key for key in state if key.startswith("stages.3."))


@both
def test_bias_and_dropout_reach_every_block(cls: type[hvt.Backbone]) -> None:
    model = tiny(cls, qkv_bias=False, drop_rate=0.2, attn_drop_rate=0.3)
    state = model.state_dict()
    assert not any(key.endswith(("attn.q.bias", "attn.kv.bias", "attn.qkv.bias")) for key in state)
    assert "stages.1.blocks.1.attn.proj.bias" in state
    for block in (block for stage in model.stages for block in stage.blocks):
        assert (block.attn.attn_drop_rate, block.attn.proj_drop.p, block.mlp.drop.p) == (0.3, 0.2, 0.2)


def test_local_attention_drops_out_only_in_training() -> None:
    x = torch.randn(1, 8, 8, 6)
    attn = randomise(LocalAttention(6, 2, (4, 4), attn_drop_rate=0.5))
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


def test_initial_values() -> None:
    block = hvt.TwinsSVT(out_indices=(0,)).stages[0].blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.position.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.15)
    assert not block.position.bias.any()


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (hvt.TwinsPCPVT, {"sr_ratios": (8, 4)}, "2 of sr_ratios"),
        (hvt.TwinsPCPVT, {"norm_after_stage": (True, False)}, "2 of norm_after_stage"),
        (hvt.TwinsPCPVT, {"norm_after_stage": (3,)}, "True or False"),
        (hvt.TwinsPCPVT, {"num_heads": (1, 2, 3, 8)}, "stage 2 has 20 channels, which 3 heads"),
        (hvt.TwinsSVT, {"window_sizes": (7, 7)}, "4 of depths, 2 of window_sizes"),
        (hvt.TwinsSVT, {"window_sizes": (7, 7, 0, 7)}, "window_sizes is 0"),
        (hvt.TwinsSVT, {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_arguments_that_do_not_fit(cls: type[hvt.Backbone], arguments: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        tiny(cls, **arguments)
