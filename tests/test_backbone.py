"""The promise of `Backbone`, for every family."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.layers.block import Block

from .families import FRAMES, TINY, images, tiny, tiny_classifier

families = pytest.mark.parametrize("family", TINY)
attending = pytest.mark.parametrize("family", [name for name in TINY if "qkv_bias" in TINY[name].func.arguments()])


@families
@pytest.mark.parametrize("size", [(32, 129), (75, 50)])
def test_maps_have_the_stated_channels_and_strides(family: str, size: tuple[int, int]) -> None:
    model = tiny(family).eval()
    assert model.strides == (4, 8, 16, 32)
    maps = model(images(family, *size))
    assert tuple(x.shape[1] for x in maps) == model.channels
    assert model.num_features == maps[-1].shape[1]
    for x, stride in zip(maps, model.strides, strict=True):
        assert x.shape[0] == 2
        assert x.isfinite().all()
        for found, side in zip(x.shape[-2:], size, strict=True):
            assert found in {side // stride, -(-side // stride), max(side // stride, 1)}


@families
def test_out_indices_choose_stages_and_later_ones_are_not_built(family: str) -> None:
    whole, part = tiny(family), tiny(family, out_indices=(0, 2))
    assert len(part.stages) == 3
    assert (part.channels, part.strides) == ((8, whole.channels[2]), (4, 16))
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if k in part.state_dict()})
    x = images(family, 64, 64)
    expected = whole(x)
    for ours, theirs in zip(part(x), (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(ours, theirs)
    sum(y.sum() for y in part(x)).backward()
    assert all(p.grad is not None for p in part.parameters()), "a parameter that no output uses breaks DDP"


@families
@pytest.mark.parametrize("indices", [(), (4,), (-1,), (1, 0), (1, 1)])
def test_wrong_out_indices(family: str, indices: tuple[int, ...]) -> None:
    with pytest.raises(hvt.InputError, match="out_indices"):
        tiny(family, out_indices=indices)


@families
def test_other_input_channels(family: str) -> None:
    model = tiny(family, in_chans=5).eval()
    assert len(model(images(family, 32, 32, channels=5))) == 4
    with pytest.raises(hvt.InputError, match="3 channels, the model takes 5.*in_chans=3"):
        model(images(family, 32, 32))


@families
def test_wrong_images(family: str) -> None:
    model = tiny(family)
    time, length = ("T, ", f"{FRAMES}, ") if model.axes == 3 else ("", "")
    with pytest.raises(hvt.InputError, match=rf"\(B, C, {time}H, W\), got \(3, {length}32, 32\)"):
        model(images(family, 32, 32)[0])
    with pytest.raises(hvt.InputError, match="3x40, smaller than one 4x4 patch"):
        model(images(family, 3, 40))
    for given in (images(family, 40, 40).to(torch.uint8), [[1.0]]):
        with pytest.raises(hvt.InputError, match="floating-point tensor"):
            model(given)


@families
def test_an_empty_batch_gives_empty_maps(family: str) -> None:
    assert [x.shape[0] for x in tiny(family).eval()(images(family, 40, 40, batch=0))] == [0, 0, 0, 0]


@families
def test_a_sample_does_not_depend_on_its_batch(family: str) -> None:
    model = tiny(family).double().eval()
    x = images(family, 49, 61, batch=3).double()
    for alone, together in zip(model(x[1:2]), model(x), strict=True):
        torch.testing.assert_close(alone, together[1:2], rtol=1e-9, atol=1e-10)


@families
def test_checkpointing_changes_memory_not_numbers(family: str) -> None:
    model = tiny(family).double().train()
    saved: list[int] = []

    def run() -> tuple[list[Tensor], int]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = sum(y.square().sum() for y in model(images(family, 64, 64).double()))
        kept = sum(saved)
        return torch.autograd.grad(loss, list(model.parameters())), kept

    plain, plain_memory = run()
    memory = {}
    branches = ("attention", "mlp") if all(isinstance(block, Block) for block in model.stages[0].blocks) else ()
    for kind in (True, "block", "stage", *branches):
        model.set_grad_checkpointing(kind)
        checkpointed, memory[kind] = run()
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)
    assert memory["stage"] <= memory[True] == memory["block"] < plain_memory / 2
    assert all(memory["block"] < memory[branch] < plain_memory for branch in branches)
    if not branches:
        with pytest.raises(hvt.InputError, match="which .* has not: give block or stage"):
            model.set_grad_checkpointing("mlp")
    model.set_grad_checkpointing(False)
    assert run()[1] == plain_memory
    with pytest.raises(hvt.InputError, match="grad checkpointing is 'layer': give True, False, block, stage"):
        model.set_grad_checkpointing("layer")


@families
def test_frozen_stages_get_no_gradient_and_stay_in_eval_mode(family: str) -> None:
    model = tiny(family, drop_path_rate=0.5)
    model.freeze_stages(2)
    model.train()
    assert [stage.training for stage in model.stages] == [False, False, True, True]
    sum(y.sum() for y in model(images(family, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(("stages.0.", "stages.1.")), name
    model.freeze_stages(0)
    assert all(p.requires_grad for p in model.parameters())
    assert all(stage.training for stage in model.stages)
    with pytest.raises(hvt.InputError, match="cannot freeze 5 stages: the model has 4"):
        model.freeze_stages(5)


def test_freezing_includes_the_absolute_position_embedding() -> None:
    model = tiny("swin", ape_size=8)
    model.freeze_stages(1)
    assert not model.absolute_pos_embed.requires_grad


@families
def test_param_groups_decay_by_layer_and_spare_norms_and_biases(family: str) -> None:
    model = tiny_classifier(family)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.param_groups(lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    grouped = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    blocks = sum(len(stage.blocks) for stage in model.backbone.stages)
    assert len({group["lr"] for group in groups}) == blocks + 2
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert scale["head.weight"] == 1.0
    assert scale["backbone.stages.3.norm.weight"] == scale["backbone.stages.3.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["backbone.stages.0.downsample.proj.weight"] == 0.5 ** (blocks + 1)
    assert scale["backbone.stages.0.blocks.0.norm1.weight"] == 0.5**blocks
    assert scale["backbone.stages.1.downsample.norm.weight"] == scale["backbone.stages.1.blocks.0.norm1.weight"]
    for group in groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])
    spared = ("bias", "norm", "position_bias", "logit_scale", "absolute_pos_embed", "position.")
    for name, value in decay.items():
        assert value == (0.0 if any(word in name for word in spared) else 0.05), name
    assert len(model.param_groups()) == 2
    assert "lr" not in model.param_groups()[0]


@families
def test_param_groups_leave_frozen_parameters_out(family: str) -> None:
    model = tiny_classifier(family)
    model.freeze_stages(4)
    assert sum(len(group["params"]) for group in model.param_groups(layer_decay=0.7)) == 2  # the head


@families
def test_models_are_copied_pickled_and_moved(family: str) -> None:
    model = tiny(family).eval()
    x = images(family, 40, 40)
    with torch.inference_mode():
        expected = model(x)[-1]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(twin(x)[-1], expected)
        torch.testing.assert_close(model.double()(x.double())[-1].float(), expected, rtol=1e-3, atol=1e-4)


@families
def test_a_model_built_on_meta_needs_only_its_state_dict(family: str) -> None:
    model = tiny(family).eval()
    with torch.device("meta"):
        empty = TINY[family]()
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(empty(images(family, 40, 40)), model(images(family, 40, 40)))


@families
def test_inference_before_training_does_no_harm(family: str) -> None:
    model = tiny(family).eval()
    with torch.inference_mode():
        model(images(family, 40, 40))
    sum(y.sum() for y in model.train()(images(family, 40, 40))).backward()


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_windows_may_be_oblong_and_differ_by_stage(family: str) -> None:
    model = tiny(family, window_size=((4, 2), (2, 4), (3, 3), (1, 1))).eval()
    assert [x.shape[-2:] for x in model(images(family, 36, 52))] == [(9, 13), (5, 7), (3, 4), (2, 2)]
    for wrong in ((4, 2, 3), 0, ((4, 2), 3, 3, (1,)), 2.5):
        with pytest.raises((hvt.InputError, TypeError)):
            tiny(family, window_size=wrong)


@families
def test_classifier(family: str) -> None:
    model = tiny_classifier(family).eval()
    x = images(family, 64, 64)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    assert features.shape[-2:] == (2, 2)
    pooled = features.flatten(2).mean(-1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.head(pooled))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), features)
    for classes, pool in ((7, None), (7, ""), (0, "max"), (-1, "avg")):
        with pytest.raises(hvt.InputError, match="global_pool is|num_classes must"):
            model.reset_classifier(classes, pool)


@families
def test_stochastic_depth_grows_over_all_blocks(family: str) -> None:
    model = tiny(family, drop_path_rate=0.6)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(7)])
    short = tiny(family, drop_path_rate=0.6, out_indices=(0,))
    assert [block.drop_path.drop_prob for block in short.stages[0].blocks] == pytest.approx(rates[:2])


@attending
@pytest.mark.parametrize("kind", ["drop_rate", "attn_drop_rate"])
def test_dropout_acts_in_training_only(family: str, kind: str) -> None:
    model, x = tiny(family, **{kind: 0.5}), images(family, 40, 40)
    assert not torch.allclose(model(x)[-1], model(x)[-1])
    model.eval()
    torch.testing.assert_close(model(x)[-1], model(x)[-1])


@attending
def test_bias_and_dropout_reach_every_block(family: str) -> None:
    model = tiny(family, qkv_bias=False, drop_rate=0.2, attn_drop_rate=0.3)
    names = {name.rpartition("attn.")[2] for name, _ in model.named_parameters() if "attn." in name}
    assert "proj.bias" in names
    assert not names & {"q.bias", "kv.bias", "qkv.bias", "q_bias", "v_bias"}
    for block in (block for stage in model.stages for block in stage.blocks):
        assert (block.attn.attn_drop_rate, block.attn.proj_drop.p, block.mlp.drop.p) == (0.3, 0.2, 0.2)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.2}


@pytest.mark.parametrize("family", [name for name in TINY if "qk_scale" in TINY[name].func.arguments()])
def test_the_scale_of_logits_may_be_given(family: str) -> None:
    """As queries that are so many times as long."""
    given, model = tiny(family, qk_scale=0.7).double().eval(), tiny(family).double().eval()
    for name, parameter in model.named_parameters():
        *_, layer, _ = name.split(".")
        if layer in ("q", "qkv"):
            attention = model.get_submodule(name.partition(f".{layer}.")[0])
            dim = attention.proj.in_features
            parameter.data[:dim] *= 0.7 * (dim // attention.num_heads) ** 0.5
    for one, other in zip(given(images(family, 50, 75).double()), model(images(family, 50, 75).double()), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(hvt.InputError, match="qk_scale is 0"):
        tiny(family, qk_scale=0)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    from hvt_backbones.layers.block import DropPath

    drop = DropPath(0.25).train()
    y = drop(torch.ones(4000, 3))
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert (y == y[:, :1]).all()
    assert abs(y.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(y), y)
