"""Attention in (shifted) windows and its relative position biases, over any number of axes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import BiasTable, takes_extent, window_attention
from ..ops.eager import constant
from ..ops.windows import at_least, at_most, padding_value

SMALL_MAP = ("pad", "shrink")


def mixed_radix(window: tuple[int, ...], bases: Sequence[int], device: torch.device) -> Tensor:
    """The coordinates of each token of a window as digits of one number, to these bases: (N,), int64."""
    axes = torch.meshgrid(*(torch.arange(side, device=device) for side in window), indexing="ij")
    number = torch.zeros(math.prod(window), dtype=torch.long, device=device)
    for digit, base in zip(axes, bases, strict=True):
        number = number * base + digit.flatten()
    return number


@constant()
def token_places(window: tuple[int, ...], table: tuple[int, ...], device: torch.device) -> Tensor:
    """A number for each token of a window, (N,), int64, as `BiasTable` has them, for a table of windows of `table`."""
    # offsets go from -(side - 1) to side - 1
    return mixed_radix(window, [2 * side - 1 for side in table], device)


@constant()
def relative_position_index(window: tuple[int, ...], table: tuple[int, ...], device: torch.device) -> Tensor:
    """Row of a table made for windows of size `table` for each pair of tokens of a window: (N * N,), int64."""
    return pairs(token_places(window, table, device), table)


def pairs(places: Tensor, table: tuple[int, ...]) -> Tensor:
    """Row of a table made for windows of size `table` for each pair of `token_places` in it: (N * N,), int64."""
    middle = math.prod([2 * side - 1 for side in table]) // 2  # a list: the compiler takes no generator
    return (places[:, None] - places + middle).flatten()


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
        scaled.append(8 * offsets / at_least((pretrained_side or side) - 1, 1))
    coordinates = torch.stack(torch.meshgrid(*scaled, indexing="ij"), dim=-1).flatten(0, -2)
    return torch.sign(coordinates) * torch.log2(coordinates.abs() + 1) / math.log2(8)


class PositionBias(nn.Module):
    """A bias for each head and pair of tokens of a window, made anew at each call: nothing of it is kept."""

    def __init__(self, window_size: Sequence[int], num_heads: int) -> None:
        super().__init__()
        self.window_size = tuple(window_size)
        self.num_heads = num_heads

    def forward(
        self,
        window: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        whole: bool = True,
        extent: tuple[int, ...] | None = None,
    ) -> Tensor | BiasTable:
        """The bias (num_heads, N, N) in float32 or wider for a window of `window`, at most `window_size`.

        With an `extent`, only so many of its tokens along each axis count, as in `window_attention`.

        Device and dtype are those of the map that is to be attended: the weights may lie elsewhere between calls.
        Unless `whole`, only a table is made, of which `window_attention` takes what each part needs.
        """
        extent = window if extent is None else extent
        table = self._table(window, extent, device, dtype)
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        if not whole:
            return BiasTable(table, self._places(window, extent, device))
        size = math.prod(window)
        index = self._index(window, extent, device)
        return table.index_select(0, index).view(size, size, self.num_heads).permute(2, 0, 1).contiguous()

    def _table(
        self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """A bias for each offset and head, (offsets, num_heads)."""
        raise NotImplementedError

    def _window_of_table(self, window: tuple[int, ...]) -> tuple[int, ...]:
        """The window whose offsets the table has."""
        return self.window_size

    def _places(self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device) -> Tensor:
        """`token_places` in the table, (N,)."""
        return token_places(window, self._window_of_table(window), device)

    def _index(self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device) -> Tensor:
        """The row of the table for each pair of tokens, (N * N,)."""
        return relative_position_index(window, self._window_of_table(window), device)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}"


class RelativePositionBias(PositionBias):
    """A learned table (Swin, arXiv:2103.14030, Sec. 3.2); a smaller window uses its rows of the same offsets."""

    def __init__(self, window_size: Sequence[int], num_heads: int) -> None:
        super().__init__(window_size, num_heads)
        self.table = nn.Parameter(torch.zeros(math.prod(2 * side - 1 for side in self.window_size), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def _table(
        self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        return self.table


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

    def _table(
        self, window: tuple[int, ...], extent: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        # the network's layers may have no parameters of a floating-point type: quantised ones, or those of FSDP
        dtype = next((p.dtype for p in self.mlp.parameters() if p.is_floating_point()), dtype)
        # float32 first for a float64 model, too, as the official buffers are
        pretrained = tuple(side or here for side, here in zip(self.pretrained_window_size, extent, strict=True))
        offsets = relative_coordinates(window, pretrained, device).to(dtype)
        # the meta device has no autocast to switch off
        with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
            table = self.mlp(offsets)
        return 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))

    def _window_of_table(self, window: tuple[int, ...]) -> tuple[int, ...]:
        return window

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pretrained_window_size={self.pretrained_window_size}"


class WindowAttention(nn.Module):
    """Attention in (shifted) windows with a learned relative position bias (Swin, Sec. 3.2).

    Args:
        dim, num_heads: channels and heads.
        window_size: tokens per window along each axis.
        shifted: shift by half a window.
        qkv_bias, qk_scale, attn_drop_rate, drop_rate: as in the official code.
        small_map: what to do where the map is not larger than the window: "shrink" the window to the map's shorter
            side and do not shift (the official classifier), or "pad" the map and keep both (the dense code). A window
            whose sides differ, which the official classifier has not, shrinks along each axis by itself, as in timm
            and in `VideoSwinTransformer`.

    Shape: (B, *spatial, C) -> (B, *spatial, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        *,
        shifted: bool,
        small_map: str,
        qkv_bias: bool,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = tuple(side // 2 if shifted else 0 for side in window_size)
        if small_map not in SMALL_MAP:
            raise InputError(f"small_map is {small_map!r}: choose one of {', '.join(SMALL_MAP)}")
        self.small_map = small_map
        self.each_axis = len(set(window_size)) > 1
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.max_logits: int | None = None  # by `Backbone.set_sequential_attention`
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.position_bias: nn.Module = RelativePositionBias(window_size, num_heads)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def fit_window(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and shift for a map of this size."""
        if self.small_map == "pad" or all(n > side for n, side in zip(spatial, self.window_size, strict=True)):
            return self.window_size, self.shift_size
        if self.each_axis:
            return self.fit_each_axis(spatial)
        shortest = min(spatial)
        return tuple(min(side, shortest) for side in self.window_size), (0,) * len(self.window_size)

    def fit_each_axis(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and shift where each axis shrinks by itself."""
        fits = [n > side for n, side in zip(spatial, self.window_size, strict=True)]
        window = tuple(side if fit else n for n, side, fit in zip(spatial, self.window_size, fits, strict=True))
        return window, tuple(shift if fit else 0 for shift, fit in zip(self.shift_size, fits, strict=True))

    def fit_extent(self, spatial: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What `fit_window` finds, as arithmetic: lengths that are symbols would make one graph for each branch."""
        if not self.each_axis:
            spatial = [functools.reduce(at_most, spatial)] * len(spatial)
        extent = tuple(at_most(n, side) for n, side in zip(spatial, self.window_size, strict=True))
        larger = [at_most(n, side + 1) - here for n, side, here in zip(spatial, self.window_size, extent, strict=True)]
        return extent, tuple(shift and shift * one for shift, one in zip(self.shift_size, larger, strict=True))

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (..., C) -> (..., 3C)."""
        return self.qkv(x)

    def padding_value(self, x: Tensor, window: tuple[int, ...]) -> Tensor | None:
        """Query, key and value (3C,) of the tokens with which the map is padded; None where there are none."""
        return padding_value(x, window, self.project)

    def logit_multiplier(self) -> Tensor | None:
        """Factor on cosine logits; None for dot products."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        spatial = x.shape[1:-1]
        of_map: dict[str, Any] = {}
        part = {} if self.max_logits is None else {"whole": False}
        if self.small_map == "shrink" and self.max_logits is None and takes_extent(x):
            window, (extent, shift) = self.window_size, self.fit_extent(spatial)
            of_map = {"extent": extent}
        else:
            window, shift = self.fit_window(spatial)
            extent = window
        pad_value = self.padding_value(x, extent)
        x = window_attention(
            self.project(x),
            self.position_bias(window, x.device, x.dtype, **part, **of_map),
            window,
            shift,
            self.num_heads,
            scale=self.scale,
            logit_scale=self.logit_multiplier(),
            pad_value=pad_value,
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            max_logits=self.max_logits,
            **of_map,
        )
        return self.proj_drop(self.proj(x))


class CosineWindowAttention(WindowAttention):
    """Scaled cosine attention with a log-spaced continuous position bias; keys have no bias (SwinV2, Sec. 3.2-3.3)."""

    MAX_LOG_SCALE = 4.605170249938965  # log(100) in float32, as the official clamp has it

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        *,
        qkv_bias: bool,
        pretrained_window_size: tuple[int, ...],
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, window_size, qkv_bias=False, **arguments)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.position_bias = LogPositionBias(window_size, num_heads, pretrained_window_size)

    def project(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.q_bias is None or self.v_bias is None:
            return qkv
        return qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)

    def padding_value(self, x: Tensor, window: tuple[int, ...]) -> Tensor | None:
        value = super().padding_value(x, window)
        if value is None:
            return None
        q, k, v = value.chunk(3)
        # The norm of a key of zeros has a gradient of 1e12, too large for float16; times the token of zeros it is none.
        return torch.cat([q, torch.where(k == 0, k.detach(), k), v])

    def logit_multiplier(self) -> Tensor:
        scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        return scale.clamp(max=self.MAX_LOG_SCALE).exp()
