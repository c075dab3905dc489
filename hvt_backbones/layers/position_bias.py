"""Relative position biases of shifted-window attention, over any number of axes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.eager import constant


def _offsets(window: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets between the tokens of a window: (N, N, axes), each from -(side - 1) to side - 1."""
    axes = torch.meshgrid(*(torch.arange(side, device=device) for side in window), indexing="ij")
    tokens = torch.stack(axes, dim=-1).flatten(0, -2)
    return tokens[:, None] - tokens[None]


@constant()
def relative_position_index(window: tuple[int, ...], table: tuple[int, ...], device: torch.device) -> Tensor:
    """Row of a table made for windows of size `table` for each pair of tokens of a window: (N * N,), int64."""
    index = torch.zeros((), dtype=torch.long, device=device)
    for axis, offset in enumerate(_offsets(window, device).unbind(-1)):
        index = index * (2 * table[axis] - 1) + offset + table[axis] - 1
    return index.flatten()


@constant()
def relative_coordinates(window: tuple[int, ...], pretrained: tuple[int, ...], device: torch.device) -> Tensor:
    """Log-spaced offsets of SwinV2 (arXiv:2111.09883, Sec. 3.3): (prod(2 * side - 1), axes), float32.

    They are divided by the window of pretraining where that is given (not zero), so that a model moves to a larger
    window by extrapolation of small ratios.
    """
    scaled = []
    for side, pretrained_side in zip(window, pretrained, strict=True):
        offsets = torch.arange(1 - side, side, dtype=torch.float32, device=device)
        # a window of one token has the offset 0 alone; its official divisor would be 0
        scaled.append(8 * offsets / max((pretrained_side or side) - 1, 1))
    coordinates = torch.stack(torch.meshgrid(*scaled, indexing="ij"), dim=-1).flatten(0, -2)
    return torch.sign(coordinates) * torch.log2(coordinates.abs() + 1) / math.log2(8)


class PositionBias(nn.Module):
    """A bias for each head and pair of tokens of a window, made anew at each call: nothing of it is kept."""

    def __init__(self, window_size: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.num_heads = num_heads

    def forward(self, window: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The bias (num_heads, N, N) in float32 or wider for a window of `window`, at most `window_size`.

        Device and dtype are those of the map that is to be attended: the weights may lie elsewhere between calls.
        """
        raise NotImplementedError

    def _gather(self, table: Tensor, index: Tensor, window: tuple[int, ...]) -> Tensor:
        size = math.prod(window)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return table.index_select(0, index).view(size, size, self.num_heads).permute(2, 0, 1).contiguous()

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}"


class RelativePositionBias(PositionBias):
    """A learned table (Swin, arXiv:2103.14030, Sec. 3.2); a smaller window uses its rows of the same offsets."""

    def __init__(self, window_size: Sequence[int], num_heads: int) -> None:
        super().__init__(window_size, num_heads)
        self.table = nn.Parameter(torch.zeros(math.prod(2 * side - 1 for side in self.window_size), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, window: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._gather(self.table, self._index(window, device), window)

    def _index(self, window: tuple[int, ...], device: torch.device) -> Tensor:
        """The row of the table for each pair of tokens, (N * N,)."""
        return relative_position_index(window, self.window_size, device)


class LogPositionBias(PositionBias):
    """A small network over log-spaced offsets (SwinV2, arXiv:2111.09883, Sec. 3.3), in its own type under autocast too.

    Args:
        pretrained_window_size: window of pretraining per axis, by which offsets are divided; 0 for the window itself.
    """

    HIDDEN = 512  # fixed by the official code and by every released checkpoint

    def __init__(self, window_size: Sequence[int], num_heads: int, pretrained_window_size: Sequence[int]) -> None:
        super().__init__(window_size, num_heads)
        self.pretrained_window_size = tuple(pretrained_window_size)
        self.mlp = nn.Sequential(
            nn.Linear(len(self.window_size), self.HIDDEN), nn.ReLU(), nn.Linear(self.HIDDEN, num_heads, bias=False)
        )

    def forward(self, window: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        # the network's layers may have no parameters of a floating-point type: quantised ones, or those of FSDP
        dtype = next((p.dtype for p in self.mlp.parameters() if p.is_floating_point()), dtype)
        # float32 first for a float64 model, too, as the official buffers are
        offsets = relative_coordinates(window, self.pretrained_window_size, device).to(dtype)
        # the meta device has no autocast to switch off
        with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
            table = self.mlp(offsets)
        table = 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))
        return self._gather(table, relative_position_index(window, window, device), window)
