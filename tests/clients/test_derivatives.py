"""What differentiates, attributes and shards: forward mode, per-sample gradients, captum, FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from captum.attr import DeepLift
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..families import images, tiny_classifier
from .models import SIZES, Make, every_model, families, layers, maps, same, scalar

sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@every_model
@sizes
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_mode_agrees_with_reverse_mode(family: str, make: Make, size: tuple[int, int], training: bool) -> None:
    model = make(family).double().train(training)
    x = images(family, *size).double()
    direction = torch.randn_like(x)
    found, along = torch.func.jvp(lambda x: maps(model, x), (x,), (direction,))
    same(found, maps(model, x))
    with forward_ad.dual_level():
        dual = maps(model, forward_ad.make_dual(x, direction))
        same([forward_ad.unpack_dual(y).tangent for y in dual], along, near=1e-8)
    leaf = x.clone().requires_grad_()
    weights = [torch.randn_like(y) for y in found]
    (gradient,) = torch.autograd.grad(maps(model, leaf), leaf, weights)
    forward = sum((w * y).sum() for w, y in zip(weights, along, strict=True))
    torch.testing.assert_close(forward, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


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


@families
def test_derivatives_of_derivatives_and_ensembles(family: str) -> None:
    models = [tiny_classifier(family).eval().double().requires_grad_(False) for _ in range(2)]
    x = images(family, 45, 70, batch=1).double()
    direction = torch.randn_like(x)

    def loss(x: Tensor) -> Tensor:
        return models[0](x).square().sum()

    (expected,) = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)
    torch.testing.assert_close(torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))[0], expected)
    found, curved = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))
    torch.testing.assert_close(found, expected)
    twice = torch.func.grad(lambda x: (torch.func.grad(loss)(x) * direction).sum())(x)
    same([curved], [twice], near=1e-8)

    for parameter in models[1].parameters():
        parameter.data.mul_(1.1)
    together = torch.func.stack_module_state(models)
    outputs = torch.func.vmap(lambda state: torch.func.functional_call(models[0], state, (x,)))(together)
    same(list(outputs), [model(x) for model in models])


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
@families
@sizes
def test_deep_lift_attributes(family: str, size: tuple[int, int]) -> None:
    """It watches each activation module, which may serve one place alone; without them the rule is the gradient."""
    model = tiny_classifier(family).double().eval()
    x = images(family, *size).double()
    baseline, watched = x + 1e-4 * torch.randn_like(x), set()
    activations = layers(model, (torch.nn.GELU, torch.nn.ReLU))
    for name, layer in activations.items():
        layer.register_forward_hook(lambda *_, name=name: watched.add(name))
    attributed = DeepLift(model).attribute(x, baseline, target=1)
    assert watched == set(activations)
    # so near its baseline a model is linear, and what each pixel adds sums up to the difference
    difference = (model(x) - model(baseline))[:, 1]
    torch.testing.assert_close(attributed.flatten(1).sum(1), difference, rtol=1e-2, atol=1e-9)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> object:
    store: Path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@every_model
@pytest.mark.parametrize("all_of_it", [False, True], ids=["stages", "model"])
def test_stages_are_sharded(family: str, make: Make, all_of_it: bool, mesh: object) -> None:
    x = images(family, 45, 70)
    model, sharded = make(family), make(family)
    expected = maps(model, x)
    scalar(expected).backward()
    for stage in getattr(sharded, "backbone", sharded).stages:
        assert isinstance(fully_shard(stage, mesh=mesh), FSDPModule)
    if all_of_it:
        fully_shard(sharded, mesh=mesh)
    found = maps(sharded, x)
    same(found, expected)
    scalar(found).backward()
    for ours, theirs in zip(sharded.parameters(), model.parameters(), strict=True):
        gradient = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(gradient, theirs.grad, rtol=1e-3, atol=1e-5)
