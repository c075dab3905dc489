"""Small models of all families as other libraries meet them: a backbone or a classifier, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from ..families import TINY, tiny, tiny_classifier

# every model of these tests: (family, how it is built); of classifiers, one for each thing that they have beside a
# backbone: windows that shrink, norms that are not there, the head
MODELS = [
    pytest.param(family, make, id=f"{family}-{make.__name__}")
    for make, chosen in ((tiny, TINY), (tiny_classifier, ("swinv2", "twins_svt")))
    for family in chosen
]
every_model = pytest.mark.parametrize(("family", "make"), MODELS)
families = pytest.mark.parametrize("family", TINY)
# one that windows, strides and reductions divide, and one that nothing divides
SIZES = [(64, 64), (45, 70)]
Make = Callable[[str], nn.Module]


def maps(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What a backbone or a classifier gives, as a tuple."""
    found = model(x)
    return found if isinstance(found, tuple) else (found,)


def scalar(found: Iterable[Tensor]) -> Tensor:
    return sum(y.square().mean() for y in found)


def same(found: Iterable[Tensor], expected: Iterable[Tensor], near: float = 1e-4) -> None:
    """Equal but for the order of sums: within `near` of the largest value."""
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=near * scale, check_stride=False)


def layers(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module) -> dict[str, nn.Module]:
    """The modules of a kind that hold no others, by name; places for a layer that hold none do not count."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, kind) and not list(m.children())}
    return {name: m for name, m in found.items() if not isinstance(m, nn.Identity)}


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, new)
