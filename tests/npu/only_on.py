"""The check that a step leaves nothing on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIGURES = 4


class OnlyOn(TorchDispatchMode):
    """Inside the `with` block no operation may read or write floating numbers on another device than `device_type`.

    Autograd's threads are watched too. Allowed on the host: tensors without dimensions (the step counters of
    optimisers), up to `FIGURES` numbers in a row (loss, norm and so on, read at once), and whole numbers (the states of
    random generators, the book-keeping of DDP). Batches are moved to the device before the block.

    Raises:
        AssertionError: an operation was given or made such a tensor; it is named, and so is the tensor's shape.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._check(func, "was given", (args, kwargs))
        result = func(*args, **kwargs)
        self._check(func, "made", result)
        return result

    def _check(self, func: Callable[..., Any], verb: str, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.device.type != self.device_type:
                few = value.dim() <= 1 and value.numel() <= FIGURES
                assert few or not value.is_floating_point(), (
                    f"{func} {verb} a tensor {tuple(value.shape)} of {value.dtype} on {value.device}, "
                    f"not on {self.device_type}"
                )
