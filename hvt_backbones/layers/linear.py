"""Linear layers that take oneDNN's matrix products on the CPU.

For float32, PyTorch gives a linear layer to MKL and its activation to a pass of its own. oneDNN, which PyTorch ships
for convolutions and for compiled models, was 5 to 25 % faster at the sizes of our layers, and applies GELU to a tile
while it is in the cache. On other devices and types, and wherever a graph is traced or operations are watched,
PyTorch's own path is taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PLAIN = (Tensor, nn.Parameter)
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def plain_eager() -> bool:
    """Whether operations run one by one under autograd alone: not compiled, traced, transformed or watched.

    Only then may an operation be replaced by one that the others do not know, or by a hand-written autograd function.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None  # vmap, grad and the like of torch.func
        or is_in_torch_dispatch_mode()  # counters of operations and the like
    )


def _takes(x: Tensor, weight: Tensor) -> bool:
    return (
        plain_eager()
        and HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.dim() > 1
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")  # "none": GELU by erf


class OneDNNLinear(torch.autograd.Function):
    """(N, in) -> (N, out), and in backward the gradient of the input alike; that of the weight is PyTorch's product."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias, "none")

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(grad.contiguous(), weight.T) if for_x else None,
            grad.T @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in) -> (..., out)."""
    if not _takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        # flat, so that what comes out of the function is no view, which could not be changed in place
        return OneDNNLinear.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
    return _onednn(x, weight, bias, "none")


class Linear(nn.Linear):
    """`nn.Linear` through `linear`, optionally with another bias than its own. Shape: (..., in) -> (..., out)."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias if bias is None else bias)


def _bare(layer: nn.Module) -> bool:
    """Whether nobody looks at, or replaced, the layer, so that its weights may be used without calling it."""
    return type(layer) is Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def linear_gelu(x: Tensor, layer: nn.Module) -> Tensor:
    """`F.gelu(layer(x))`; one pass where no gradient is needed and the layer is bare."""
    if _bare(layer) and not torch.is_grad_enabled() and _takes(x, layer.weight):
        return _onednn(x, layer.weight, layer.bias, "gelu")
    return F.gelu(layer(x))


class GELULinear(torch.autograd.Function):
    """`linear(F.gelu(x), weight, bias)`, which keeps `x` alone for backward and computes its GELU there again.

    The hidden layer is the widest tensor of a block: kept once instead of twice, a block keeps a quarter less.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight if x.requires_grad else None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        of_weight = flat.T @ F.gelu(x).flatten(0, -2) if for_weight else None
        of_bias = flat.sum(0) if for_bias else None
        of_x = torch.ops.aten.gelu_backward(linear(grad.contiguous(), weight.T), x) if for_x else None
        return of_x, of_weight, of_bias


def gelu_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """`layer(F.gelu(x))`, with less memory kept for backward where the layer is bare."""
    usual = _bare(layer) and plain_eager() and type(x) in PLAIN and type(layer.weight) in PLAIN and x.dim() > 1
    if not (usual and torch.is_grad_enabled()):
        return layer(F.gelu(x))
    # outside autocast, where the backward pass is, the types of factors have to agree
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if (autocast and x.dtype != torch.get_autocast_dtype(device)) or (not autocast and x.dtype != layer.weight.dtype):
        return layer(F.gelu(x))
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return GELULinear.apply(x, layer.weight.to(x.dtype), bias)
