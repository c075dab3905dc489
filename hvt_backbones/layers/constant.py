"""Small tensors that follow from sizes alone (indices, coordinates, masks), kept so that they are not made anew."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from .eager import plain_eager


def constant(maxsize: int = 64) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Cache a function of hashable arguments (sizes, a device) that returns a tensor.

    The tensor is made outside inference mode, so that a later training step may save it for backward. Nothing is
    kept, and what was kept is not used, while a graph is traced or operations are watched: a graph would hold it as a
    number, and a fake tensor must not outlive its context. Nor are tensors on the meta device kept.
    """

    def decorate(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: OrderedDict[tuple, Tensor] = OrderedDict()

        @functools.wraps(make)
        def get(*key) -> Tensor:
            if not plain_eager():
                return make(*key)
            if (tensor := kept.get(key)) is not None:
                return tensor
            with torch.inference_mode(False), torch.no_grad():
                tensor = make(*key)
            if type(tensor) is Tensor and tensor.device.type != "meta":
                kept[key] = tensor
                if len(kept) > maxsize:
                    kept.popitem(last=False)
            return tensor

        return get

    return decorate
