"""Whether operations run one by one under reverse-mode autograd alone, and tensors that are kept where they do."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

PROVES = TorchVersion(torch.__version__) >= "2.8"  # the compiler of others cannot be asked what holds for all sizes
_pretended: str | None = None  # a plain global, which a compiler can read
_any_size = False  # likewise
_caches: list[OrderedDict[tuple, Tensor]] = []  # of all functions that `constant` decorates


@contextmanager
def pretend(device: str) -> Iterator[None]:
    """Inside, fake tensors on the CPU go the way of real ones on this kind of device, "cpu" or "cuda", unwatched.

    For a tracker of memory (`step_memory.py`), which sees whatever is done. Constants that are kept are so inside.
    """
    global _pretended
    kept = [cache.copy() for cache in _caches]
    before, _pretended = _pretended, device
    for cache in _caches:
        cache.clear()
    try:
        yield
    finally:
        _pretended = before
        for cache, tensors in zip(_caches, kept, strict=True):
            cache.clear()
            cache.update(tensors)


def device_kind(x: Tensor) -> str:
    """The kind of device whose operations `x` is for: its own, or the one that is pretended."""
    return _pretended or x.device.type


def pretended() -> bool:
    return _pretended is not None


def _watched() -> bool:
    """Whether counters of operations, fake tensors and the like see the operations, other than inside `pretend`."""
    return is_in_torch_dispatch_mode() and not pretended()


def plain_eager() -> bool:
    """Whether nothing compiles, traces, transforms or watches the operations.

    Only then may an operation be replaced by one that the others do not know, or a tensor be kept for the next call.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None  # vmap, grad and the like of torch.func
        or _watched()
    )


@contextmanager
def any_size() -> Iterator[None]:
    """Inside, `torch.jit.trace` and ONNX's TorchScript exporter make a graph that is for images of all sizes.

    Otherwise they make a faster one, for the example's size: they keep what depends on it as numbers.
    """
    global _any_size
    before, _any_size = _any_size, True
    try:
        yield
    finally:
        _any_size = before


def surely(condition: bool) -> bool:
    """Whether a comparison of sizes holds; of symbols, whether it does for all sizes: one graph is to be for all."""
    if _any_size and isinstance(condition, Tensor):  # of traced sizes
        return False
    if not (PROVES and torch.compiler.is_compiling()):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(condition)


def symbolic(x: Tensor) -> bool:
    """Whether a graph is made in which a length of the map `x` (B, *spatial, C) is a symbol, of unknown remainder."""
    if _any_size and torch.jit.is_tracing():
        return True
    if not (PROVES and torch.compiler.is_compiling()):
        return False
    return any(not surely(length % 3 == 0) and not surely(length % 3 != 0) for length in x.shape[1:-1])


def looked_into(x: Tensor, *others: Tensor | None) -> bool:
    """Whether forward-mode AD, torch.func or, on the CPU, a counter of operations follows what is made of these.

    The CPU's fused attention has no derivative forward, no batching rule, and no count of its operations.
    """
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._functorch.maybe_current_level() is not None
    counted = x.device.type == "cpu" and _watched()
    return transformed or counted or has_tangent(x, *others)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode AD follows one of them."""
    if torch.compiler.is_compiling():
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def constant(maxsize: int = 64) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Cache a function of hashable arguments (sizes, a device) that returns a tensor.

    The tensor is made outside inference mode, so that a later training step may save it for backward. Nothing is
    kept, and what was kept is not used, while a graph is traced or operations are watched: a graph would hold it as a
    number, and a fake tensor must not outlive its context. Nor are tensors on the meta device kept.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: OrderedDict[tuple, Tensor] = OrderedDict()
        _caches.append(kept)

        @functools.wraps(make)
        def get(*key: Any) -> Tensor:
            if not plain_eager():
                return make(*key)
            if (tensor := kept.get(key)) is not None:
                return tensor
            with torch.inference_mode(False), torch.no_grad():
                tensor = make(*key)
            if (type(tensor) is Tensor or pretended()) and tensor.device.type != "meta":
                kept[key] = tensor
                if len(kept) > maxsize:
                    kept.popitem(last=False)
            return tensor

        return get

    return decorate
