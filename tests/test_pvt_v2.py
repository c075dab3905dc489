"""PVTv2 and the attention over a reduced map, against the papers' formulas written out and against timm."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.layers.attention import SpatialReductionAttention
from hvt_backbones.pvt_v2 import ConvMlp, OverlapPatchEmbed

from .families import randomise

TINY = {
    "embed_dims": (8, 16, 20, 32),
    "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (4, 4, 2, 2),
    "sr_ratios": (8, 4, 2, 1),
}


def tiny(**arguments) -> hvt.PyramidVisionTransformerV2:
    return randomise(hvt.PyramidVisionTransformerV2(**{"drop_path_rate": 0.0, **TINY, **arguments})).double()


def assert_same(module: nn.Module, reference, x: Tensor) -> None:
    """Outputs and the gradients of the input and of every parameter agree."""
    leaves = [x.requires_grad_(), *module.parameters()]
    ours, theirs = module(x), reference(x, module)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), leaves) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


def reduce_by_hand(x: Tensor, attn: SpatialReductionAttention, ratio: int) -> Tensor:
    """Keys' tokens (B, n, C): one product per position in the square, over the squares that are whole."""
    if attn.linear:
        cells = []
        for i in range(7):
            for j in range(7):
                rows, columns = (
                    slice(k * n // 7, math.ceil((k + 1) * n / 7)) for k, n in ((i, x.shape[1]), (j, x.shape[2]))
                )
                cells.append(x[:, rows, columns].mean((1, 2)))
        tokens = torch.stack(cells, dim=1) @ attn.sr.weight[:, :, 0, 0].T + attn.sr.bias
    elif ratio == 1:
        return x.flatten(1, 2)
    else:
        height, width = x.shape[1] // ratio, x.shape[2] // ratio
        tokens = attn.sr.bias
        for i in range(ratio):
            for j in range(ratio):
                picked = x[:, i : height * ratio : ratio, j : width * ratio : ratio]
                tokens = tokens + picked.flatten(1, 2) @ attn.sr.weight[:, :, i, j].T
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, unbiased=False)
    tokens = (tokens - mean) / (variance + 1e-5).sqrt() * attn.norm.weight + attn.norm.bias
    return tokens * 0.5 * (1 + torch.erf(tokens / math.sqrt(2))) if attn.linear else tokens


def attend_by_hand(x: Tensor, attn: SpatialReductionAttention, ratio: int) -> Tensor:
    batch, height, width, dim = x.shape
    q, tokens = attn.q(x).flatten(1, 2), reduce_by_hand(x, attn, ratio)
    k, v = attn.kv(tokens).split(dim, dim=-1)
    heads = []
    for columns in torch.arange(dim).chunk(attn.num_heads):
        logits = q[..., columns] @ k[..., columns].mT / math.sqrt(len(columns))
        heads.append(logits.softmax(-1) @ v[..., columns])
    return attn.proj(torch.cat(heads, dim=-1)).reshape(batch, height, width, dim)


@pytest.mark.parametrize(
    ("ratio", "linear", "size"),
    [(1, False, (3, 5)), (1, False, (1, 1)), (2, False, (4, 6)), (3, False, (8, 11)), (4, False, (4, 7)),
     (1, True, (9, 13)), (8, True, (7, 7)), (8, True, (3, 1))],
)  # fmt: skip
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_attention_matches_the_formula(ratio: int, linear: bool, size: tuple[int, int], qkv_bias: bool) -> None:
    attn = SpatialReductionAttention(12, 3, sr_ratio=ratio, linear=linear, qkv_bias=qkv_bias)
    attn = randomise(attn).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    assert_same(attn, lambda x, attn: attend_by_hand(x, attn, ratio), x)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (8, 3)])
def test_a_map_shorter_than_a_square_is_padded_to_it(size: tuple[int, int]) -> None:
    attn = randomise(SpatialReductionAttention(8, 2, sr_ratio=4)).double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, max(4 - size[1], 0), 0, max(4 - size[0], 0)))
    expected = reduce_by_hand(padded, attn, 4)
    torch.testing.assert_close(attn.reduce(x).flatten(1, 2), expected)
    assert attn(x).shape == x.shape


def test_attention_drops_out_only_in_training() -> None:
    x = torch.randn(1, 8, 8, 8)
    attn = randomise(SpatialReductionAttention(8, 2, sr_ratio=2, attn_drop_rate=0.5))
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


@pytest.mark.parametrize("relu", [False, True])
def test_mlp_convolves_before_its_gelu(relu: bool) -> None:
    mlp = randomise(ConvMlp(6, 10, relu=relu, drop_rate=0.0)).double()

    def by_hand(x: Tensor, mlp: ConvMlp) -> Tensor:
        hidden = mlp.fc1(x)
        hidden = F.pad(hidden.clamp(min=0) if relu else hidden, (0, 0, 1, 1, 1, 1))
        height, width = x.shape[1:3]
        convolved = mlp.dwconv.bias
        for i in range(3):
            for j in range(3):
                convolved = convolved + hidden[:, i : i + height, j : j + width] * mlp.dwconv.weight[:, 0, i, j]
        return mlp.fc2(convolved * 0.5 * (1 + torch.erf(convolved / math.sqrt(2))))

    assert_same(mlp, by_hand, torch.randn(2, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_dropout_of_the_mlp_is_seen_by_hooks(gradients: bool, training: bool) -> None:
    mlp = randomise(ConvMlp(6, 10, relu=False, drop_rate=0.3)).train(training)
    seen: list[Tensor] = []
    mlp.drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.set_grad_enabled(gradients):
        y = mlp(torch.randn(1, 4, 4, 6))
    assert len(seen) == 2
    assert torch.equal(seen[-1], y)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(7, 4, (13, 20)), (3, 2, (5, 8)), (7, 4, (4, 4)), (3, 2, (1, 1))]
)
def test_patches_overlap(kernel: int, stride: int, size: tuple[int, int]) -> None:
    embed = randomise(OverlapPatchEmbed(3, 5, kernel, stride, norm_eps=1e-5)).double()

    def by_hand(x: Tensor, embed: OverlapPatchEmbed) -> Tensor:
        columns = F.unfold(x.movedim(-1, 1), kernel, padding=kernel // 2, stride=stride).mT
        grid = [math.ceil(side / stride) for side in size]
        return embed.norm((columns @ embed.proj.weight.flatten(1).T + embed.proj.bias).unflatten(1, grid))

    assert_same(embed, by_hand, torch.randn(2, *size, 3, dtype=torch.float64))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (77, 101), (32, 32)])
def test_matches_timm(linear: bool, size: tuple[int, int]) -> None:
    theirs = timm.models.pvt_v2.PyramidVisionTransformerV2(**TINY, linear=linear, num_classes=0).double().eval()
    ours = tiny(linear=linear).eval()
    state = {key.replace("stages.0.downsample.", "patch_embed."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = theirs.forward_intermediates(x, intermediates_only=True)
    for our_map, their_map in zip(ours(x), expected, strict=True):
        torch.testing.assert_close(our_map, their_map, rtol=1e-9, atol=1e-10)


def test_training_keeps_no_more_activations_than_timm() -> None:
    arguments = {**TINY, "depths": (2, 2, 2, 2)}
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
@pytest.mark.parametrize("size", [(33, 47), (32, 32), (4, 4), (5, 70)])
def test_sides_are_rounded_up(linear: bool, size: tuple[int, int]) -> None:
    model = tiny(linear=linear)
    maps = model(torch.randn(2, 3, *size, dtype=torch.float64))
    assert [tuple(x.shape[2:]) for x in maps] == [
        tuple(math.ceil(side / stride) for side in size) for stride in (4, 8, 16, 32)
    ]
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("linear", [False, True])
def test_every_parameter_learns(linear: bool) -> None:
    model = tiny(linear=linear, in_chans=2)
    sum((x * torch.randn_like(x)).sum() for x in model(torch.randn(2, 2, 96, 96, dtype=torch.float64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 1e-6, name


def test_eps_differs_between_norms() -> None:
    def eps(model: nn.Module, *ends: str) -> set[float]:
        return {m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and name.endswith(ends)}

    for linear in (False, True):
        model = tiny(linear=linear)
        assert eps(model, "norm1", "norm2", *(f"stages.{i}.norm" for i in range(4))) == {1e-6}
        assert eps(model, "downsample.norm", "attn.norm") == {1e-5}
    model = tiny(norm_eps=1e-3, patch_norm_eps=1e-4, sr_norm_eps=1e-2)
    assert eps(model, "norm1", "norm2", "stages.2.norm") == {1e-3}
    assert (eps(model, "downsample.norm"), eps(model, "attn.norm")) == ({1e-4}, {1e-2})


@pytest.mark.parametrize("linear", [False, True])
def test_state_dict_keys(linear: bool) -> None:
    keys = {f"{part}.{leaf}" for part in (
        "downsample.proj", "downsample.norm", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.attn.q", "blocks.0.attn.kv",
        "blocks.0.attn.proj", "blocks.0.attn.sr", "blocks.0.attn.norm", "blocks.0.mlp.fc1", "blocks.0.mlp.dwconv",
        "blocks.0.mlp.fc2", "norm",
    ) for leaf in ("weight", "bias")}  # fmt: skip
    state = tiny(linear=linear).state_dict()
    assert {key.removeprefix("stages.0.") for key in state if key.startswith("stages.0.")} == keys
    reduces = {key for key in keys if "attn.sr" in key or "attn.norm" in key}
    last = keys if linear else keys - reduces  # only the linear variant reduces where sr_ratio is 1
    assert {key.removeprefix("stages.3.") for key in state if key.startswith("stages.3.")} == last
    assert state["stages.0.blocks.0.attn.sr.weight"].shape == ((8, 8, 1, 1) if linear else (8, 8, 8, 8))


def test_bias_and_dropout_reach_every_block() -> None:
    model = tiny(qkv_bias=False, drop_rate=0.2, attn_drop_rate=0.3)
    state = model.state_dict()
    assert not any(key.endswith(("attn.q.bias", "attn.kv.bias")) for key in state)
    assert "stages.1.blocks.1.attn.proj.bias" in state
    for block in (block for stage in model.stages for block in stage.blocks):
        assert (block.attn.attn_drop_rate, block.attn.proj_drop.p, block.mlp.drop.p) == (0.3, 0.2, 0.2)


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
        tiny(**arguments)


def test_autocast_computes_in_bfloat16() -> None:
    model, x = tiny(linear=True).float().eval(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        maps = model(x)
    for ours, expected in zip(maps, model(x), strict=True):
        assert (ours - expected).abs().max() < 0.05 * expected.abs().max()
