"""Linear layers through oneDNN equal PyTorch's, with their gradients, and step aside wherever they must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hvt_backbones.layers import linear as module
from hvt_backbones.layers.linear import Linear, linear, linear_gelu

SHAPES = {"vector": (8,), "rows": (5, 8), "map": (2, 3, 4, 8), "no_rows": (0, 8)}


def made(shape: tuple[int, ...], bias: bool) -> list[Tensor]:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    return [x, weight, torch.randn(6, requires_grad=True)] if bias else [x, weight]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_pytorch_with_gradients_and_their_gradients(shape: tuple[int, ...], bias: bool) -> None:
    leaves = made(shape, bias)
    seed = torch.randn(*shape[:-1], 6)
    found = []
    for function in (linear, F.linear):
        out = function(*leaves)
        first = torch.autograd.grad(out.pow(2), leaves, seed, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves)
        found.append([out, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(linear(*leaves), found[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_parts_get_no_gradient(frozen: int) -> None:
    leaves = made((3, 4, 8), True)
    leaves[frozen].requires_grad_(False)
    linear(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_gelu_is_one_pass_in_inference_and_the_same() -> None:
    layer, x = Linear(8, 6), 3 * torch.randn(4, 5, 8)
    expected = F.gelu(F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(linear_gelu(x, layer), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(linear_gelu(x, layer), expected, rtol=1e-5, atol=1e-6)


def test_what_comes_out_may_be_changed_in_place() -> None:
    x, layer = torch.randn(2, 3, 8, requires_grad=True), Linear(8, 6)
    F.relu(layer(x), inplace=True).sum().backward()
    assert x.grad.isfinite().all()


def test_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where oneDNN's product would be wrong, or unseen by what watches, PyTorch's own is called."""
    calls = []
    real = module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *a: calls.append(1) or real(*a))
    layer, x = Linear(8, 6), torch.randn(3, 8)
    if module.HAS_ONEDNN:
        layer(x)
        assert calls.pop()
    layer(x.T.contiguous().T)
    layer.double()(x.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 6
    torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(x), F.linear(x, layer.weight, layer.bias))
    assert Linear(8, 6, device="meta")(x.to("meta")).is_meta
    assert not calls
    monkeypatch.setattr(module, "HAS_ONEDNN", False)
    torch.testing.assert_close(linear_gelu(x, layer), F.gelu(F.linear(x, layer.weight, layer.bias)))
    assert not calls
