"""Models under PyTorch's own tools: adapters, hooks, pruning, compilers, tracers and transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import hvt_backbones as hvt

from .families import TINY, images, tiny, tiny_classifier

families = pytest.mark.parametrize("family", TINY)


class Adapter(nn.Module):
    """As low-rank adapters wrap a linear layer: its result and a learned addition, its parameters still in reach."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.addition = nn.Linear(layer.in_features, layer.out_features, bias=False)

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.addition(x)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "position_bias" not in name
    }


@families
def test_what_takes_a_layers_place_is_used(family: str) -> None:
    model = tiny(family).eval()
    x = images(family, 40, 40)
    expected = model(x)
    for name, layer in linear_layers(model).items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, Adapter(layer))
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    with torch.inference_mode():
        assert not torch.allclose(model(x)[0], expected[0])
        for adapter in adapters:
            adapter.addition.weight.zero_()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    sum(y.square().sum() for y in model(x)).backward()
    assert all(adapter.addition.weight.grad is not None for adapter in adapters)


@families
@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_on_linear_layers_see_every_call(family: str, gradients: bool) -> None:
    model, seen = tiny(family).eval(), set()
    layers = linear_layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _m, _a, y, name=name: seen.add((name, y.shape[-1])))
    with torch.set_grad_enabled(gradients):
        model(images(family, 40, 40, batch=1))
    assert seen == {(name, layer.out_features) for name, layer in layers.items()}


@families
def test_pruned_layers_train(family: str) -> None:
    model = tiny(family)
    for layer in linear_layers(model).values():
        prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(2):
        sum(y.sum() for y in model(images(family, 40, 40, batch=1))).backward()


@families
def test_an_empty_batch_gives_empty_maps(family: str) -> None:
    assert [x.shape[0] for x in tiny(family).eval()(images(family, 40, 40, batch=0))] == [0, 0, 0, 0]


@families
@pytest.mark.filterwarnings("ignore")
def test_traced_models_are_the_same(family: str) -> None:
    model = tiny_classifier(family).eval()
    x = images(family, 64, 64, batch=1)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "swinv2", "twins_svt", "video_swin"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_compiler_gets_one_graph(family: str, mode: str) -> None:
    model = tiny_classifier(family).train(mode == "train")
    x = images(family, 64, 64)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    if mode == "train":
        ours, theirs = (torch.autograd.grad(f(x).sum(), list(model.parameters())) for f in (compiled, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["swin", "swinv2", "video_swin"])
def test_exported_programs_take_any_batch(family: str) -> None:
    model = tiny_classifier(family).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(family, 64, 64),), dynamic_shapes=({0: batch},))
    x = images(family, 64, 64, batch=5)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@families
def test_gradients_per_sample_by_vmap(family: str) -> None:
    model = tiny_classifier(family).eval()
    parameters = dict(model.named_parameters())
    x = images(family, 64, 64)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    alone = torch.autograd.grad(model(x[1:]).square().sum(), list(parameters.values()))
    for found, expected in zip(per_sample.values(), alone, strict=True):
        torch.testing.assert_close(found[1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 0}, "embed_dim is 0"),
        ({"embed_dim": 96.0}, "embed_dim is 96.0"),
        ({"in_chans": -1}, "in_chans is -1"),
        ({"in_chans": "3"}, "in_chans is '3'"),
        ({"mlp_ratio": -1.0}, "MLP ratio -1.0"),
        ({"drop_path_rate": -1.0}, "drop_path_rate is -1.0"),
        ({"attn_drop_rate": 2.0}, "attn_drop_rate is 2.0"),
        ({"window_size": 7.0}, "window_size 7.0"),
        ({"pretrained": 3}, "pretrained is 3"),
    ],
    ids=str,
)
def test_arguments_out_of_range(change: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        hvt.create_backbone("swin_tiny", **change)


@pytest.mark.parametrize("given", [torch.zeros(1, 3, 40, 40, dtype=torch.uint8), [[1.0]]], ids=["uint8", "list"])
def test_images_that_are_no_float_tensor(given: object) -> None:
    with pytest.raises(hvt.InputError, match="floating-point tensor"):
        tiny("swin")(given)
