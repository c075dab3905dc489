"""What PyTorch promises of a module: hooks see its calls, and what stands in its place is what runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune

from ..families import images, tiny, tiny_classifier
from .models import Make, every_model, families, layers, maps, replace, same, scalar

modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@every_model
@modes
def test_hooks_on_every_module_and_on_all_see_it(family: str, make: Make, training: bool) -> None:
    model = make(family).train(training)
    names = {m: n for n, m in model.named_modules() if not isinstance(m, nn.ModuleList | nn.Identity)}
    seen, seen_by_all = ({kind: set() for kind in HOOKS} for _ in range(2))
    handles = []
    for kind in HOOKS:
        for module, name in names.items():
            getattr(module, f"register_{kind}")(lambda *_, kind=kind, name=name: seen[kind].add(name))
        register = getattr(torch_module, f"register_module_{kind}")
        handles.append(register(lambda module, *_, kind=kind: seen_by_all[kind].add(names.get(module))))
    try:
        scalar(maps(model, images(family, 40, 40).requires_grad_())).backward()
        for kind in HOOKS:
            assert seen[kind] == set(names.values()), kind
            assert seen_by_all[kind] >= set(names.values()), kind
        seen["forward_hook"].clear()
        with torch.no_grad():
            model(images(family, 40, 40))
        assert seen["forward_hook"] == set(names.values())
    finally:
        for handle in handles:
            handle.remove()


def bent(y: Tensor, factor: Tensor) -> Tensor:
    """`y` at a factor of 1; at others not `y` times a number, which a norm behind it would undo."""
    return y + (factor - 1) * y.abs()


class Wrapped(nn.Module):
    """A layer out of sight: no weight, no bias, no sizes."""

    def __init__(self, inner: nn.Module, factor: Tensor) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *given: object) -> Tensor:
        return bent(self.inner(*given), self.factor)


def wrap(model: nn.Module, name: str, factor: Tensor) -> None:
    replace(model, name, Wrapped(model.get_submodule(name), factor))


def change_forward(model: nn.Module, name: str, factor: Tensor) -> None:
    layer = model.get_submodule(name)
    original = layer.forward
    layer.forward = lambda *given: bent(original(*given), factor)


@every_model
@modes
@pytest.mark.parametrize("change", [wrap, change_forward])
def test_every_layer_is_the_one_that_stands_there(family: str, make: Make, training: bool, change: Callable) -> None:
    model = make(family).train(training)
    x = images(family, 72, 64)  # several tokens in each stage: of one key alone, queries decide nothing
    expected = maps(copy.deepcopy(model), x)
    factors = {name: torch.ones((), requires_grad=True) for name in layers(model)}
    for name, factor in factors.items():
        change(model, name, factor)
    found = maps(model, x)
    same(found, expected)
    gradients = torch.autograd.grad(scalar(found), list(factors.values()))
    assert [n for n, g in zip(factors, gradients, strict=True) if g == 0] == []
    with torch.no_grad():
        same(maps(model, x), expected)
        for factor in factors.values():
            factor.fill_(0.5)
        assert not torch.allclose(maps(model, x)[0], expected[0], rtol=0.1)


@families
def test_pruned_layers_train(family: str) -> None:
    model = tiny(family)
    for layer in layers(model, nn.Linear).values():
        prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(2):
        scalar(model(images(family, 40, 40, batch=1))).backward()


def through_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.mul_(0).add_(values[name])


def by_foreach(model: nn.Module, values: dict[str, Tensor]) -> None:
    torch._foreach_copy_([p.data for p in model.parameters()], [values[n] for n, _ in model.named_parameters()])


def new_data(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = values[name]


def by_numpy(model: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.detach().numpy()[...] = values[name].numpy()


def by_assigning(model: nn.Module, values: dict[str, Tensor]) -> None:
    model.load_state_dict(model.state_dict() | values, assign=True)


@families
@pytest.mark.parametrize("write", [through_data, by_foreach, new_data, by_numpy, by_assigning])
def test_whatever_writes_the_weights_is_seen(family: str, write: Callable) -> None:
    model, other = tiny_classifier(family).eval(), tiny_classifier(family).eval()
    for parameter in other.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    x = images(family, 40, 40)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            before, expected = model(x), other(x)
        assert not torch.allclose(before, expected)
        write(model, {name: parameter.detach().clone() for name, parameter in other.named_parameters()})
        with context():
            same([model(x)], [expected])
        write(model, {name: p.detach().clone() for name, p in tiny_classifier(family).named_parameters()})
