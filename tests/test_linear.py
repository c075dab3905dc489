"""Linear layers through oneDNN equal PyTorch's, with their gradients, and step aside wherever they must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hvt_backbones.layers import linear as module
from hvt_backbones.layers.linear import Linear, gelu_linear, linear, linear_gelu

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gelu_that_is_computed_again_gives_the_same_gradients(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    x, layer = torch.randn(shape, dtype=dtype, requires_grad=True), Linear(8, 6, bias=bias).to(dtype)
    leaves, seed, found = [x, *layer.parameters()], torch.randn(*shape[:-1], 6, dtype=dtype), []
    for function in (gelu_linear, lambda x, layer: layer(F.gelu(x))):
        out = function(x, layer)
        first = torch.autograd.grad(out.pow(2), leaves, seed, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), leaves)
        found.append([out, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def kept_for_backward(function, *arguments) -> int:
    """Numbers of different tensors that autograd keeps."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function(*arguments)  # held until the count is done, or memory would be given out again
    assert result.requires_grad
    return sum(kept.values())


def test_gelu_is_not_kept_for_backward() -> None:
    x, layer = torch.randn(100, 8, requires_grad=True), Linear(8, 6)
    assert kept_for_backward(lambda: layer(F.gelu(x))) == 2 * x.numel() + layer.weight.numel()
    assert kept_for_backward(gelu_linear, x, layer) == x.numel() + layer.weight.numel()


def test_gelu_is_kept_where_the_layer_is_watched_or_another() -> None:
    x, layer, seen = torch.randn(100, 8, requires_grad=True), Linear(8, 6), []
    expected = gelu_linear(x, layer)
    layer.register_forward_hook(lambda *arguments: seen.append(1))
    torch.testing.assert_close(gelu_linear(x, layer), expected)
    assert seen
    torch.testing.assert_close(gelu_linear(x, torch.nn.Identity()), F.gelu(x))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_gelu_under_autocast(given: torch.dtype) -> None:
    x, layer = torch.randn(5, 8).to(given).requires_grad_(), Linear(8, 6)
    found = []
    for function in (gelu_linear, lambda x, layer: layer(F.gelu(x))):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(x, layer)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
    torch.testing.assert_close(*found, rtol=3e-2, atol=3e-2)


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
