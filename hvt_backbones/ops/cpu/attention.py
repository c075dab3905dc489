"""Window attention through batched matrix products, for the CPU.

A window is a short sequence. `scaled_dot_product_attention` tiles it as if it were long, or scales, masks and checks
for empty rows in passes of their own; here the first product scales, and bias and mask are added in place. A few
windows are attended at a time, in the cache, and so are their gradients.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..eager import device_kind, has_tangent, plain_eager
from ..windows import WindowGrid, cosine, distinct_windows, window_mask
from .partition import Partition, Reverse

CHUNK = 2**18  # logits that each thread makes at a time: 1 MiB of float32
# In a window with a mask, logits so far below the largest of their row are taken for none. Their weights, below 2e-35,
# are lost on sums that are 1 in any type; but many would be denormal numbers, which processors handle one by one: at
# the mask's -100 softmax took 10 times as long and the products with its weights 5 to 50 times.
LEAST = -80.0
KEPT = 4  # weights are kept for backward in windows of up to so many tokens for each channel of a head


def refuses(qkv: Tensor, *others: Tensor | None) -> str | None:
    """Why it cannot take these: it is for the CPU, and nothing can look into its autograd functions."""
    device = device_kind(qkv)
    if device != "cpu":
        return f"it is for the CPU, and the map is on {device}"
    if not plain_eager():
        return "something compiles, traces, transforms or watches the operations, and cannot look into it"
    if has_tangent(qkv, *others):
        return "it has no derivative forward"
    return None


def bmm(
    qkv: Tensor,
    bias: Tensor | None,
    window_size: tuple[int, ...],
    shift_size: tuple[int, ...],
    num_heads: int,
    *,
    scale: float,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    mask_padding: bool,
    dropout_p: float,
) -> Tensor:
    device = qkv.device
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device.type))  # what autocast would do to the factors of each product
    grid = WindowGrid(qkv.shape, window_size, shift_size, num_heads)
    maps = qkv.unflatten(-1, (3, num_heads, -1)).movedim(-3, 0)
    padding = None if pad_value is None or not grid.padded else pad_value.to(qkv.dtype).view(3, num_heads, -1)
    partitioned = Partition.apply(maps, padding, grid)
    windows = partitioned.view(3, -1, grid.tokens, partitioned.shape[-1])
    plan = Plan(grid, mask_padding, 1.0 if logit_scale is not None else scale, qkv.dtype, device, dropout_p)
    left = None
    if dropout_p:
        left = qkv.new_empty(plan.shape, dtype=torch.bool).bernoulli_(1 - dropout_p)
    given = (windows, bias, logit_scale)
    if any(tensor is not None and tensor.requires_grad for tensor in given):
        attended = Attend.apply(*given, left, plan)
    else:
        attended = _attend(*given, left, plan, out=windows[0])
    return Reverse.apply(attended.view(1, *partitioned.shape[1:]), grid)[0].flatten(-2)


@functools.lru_cache(maxsize=64)
def masked_runs(
    spatial: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], mask_padding: bool
) -> tuple[tuple[int, int, int], ...]:
    """Windows that follow each other and have the same mask other than zero: (first, end, place of the mask)."""
    smaller, places = distinct_windows(spatial, window, shift, mask_padding)
    with _disable_current_modes():  # they are numbers of the sizes, also where tensors are fake
        make = window_mask.__wrapped__  # type: ignore[attr-defined] # by functools.wraps
        masks = make(smaller, window, shift, mask_padding, torch.float32, torch.device("cpu"))
        some = masks.flatten(1).any(dim=1).tolist()
    runs, first = [], 0
    for place, same in itertools.groupby(places):
        end = first + sum(1 for _ in same)
        if some[place]:
            runs.append((first, end, place))
        first = end
    return tuple(runs)


class Part(NamedTuple):
    """Sequences that are attended together: `heads` of the windows `first` to `end` of some images."""

    sequences: slice  # of all, B * windows * heads
    first: int
    end: int
    heads: slice


class Plan:
    """How one call of window attention makes weights of logits: all but the numbers that need gradients.

    Attributes:
        wide: type of logits and weights, float32 at least.
        shape: of all logits, (B * windows * heads, N, N).
        masks, runs: those of `distinct_windows`, and `masked_runs`; none without a mask.
    """

    def __init__(
        self,
        grid: WindowGrid,
        mask_padding: bool,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        dropout_p: float,
    ) -> None:
        self.grid, self.scale = grid, scale
        self.wide = torch.promote_types(dtype, torch.float32)
        self.shape = (grid.batch * grid.windows * grid.num_heads, grid.tokens, grid.tokens)
        self.masks = torch.empty(0)
        self.runs: tuple[tuple[int, int, int], ...] = ()
        if any(grid.shift) or mask_padding:
            smaller, _ = distinct_windows(grid.spatial, grid.window, grid.shift, mask_padding)
            self.masks = window_mask(smaller, grid.window, grid.shift, mask_padding, self.wide, device)
            self.runs = masked_runs(grid.spatial, grid.window, grid.shift, mask_padding)
        self.factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0

    def part(self, images: range, windows: range, heads: range) -> Part:
        """What these have in common; they must lie in one stretch of memory."""
        count, each = self.grid.windows, self.grid.num_heads
        begin = (images[0] * count + windows[0]) * each + heads[0]
        end = (images[-1] * count + windows[-1]) * each + heads[-1] + 1
        return Part(slice(begin, end), windows[0], windows[-1] + 1, slice(heads[0], heads[-1] + 1))

    def everything(self) -> Part:
        return self.part(range(self.grid.batch), range(self.grid.windows), range(self.grid.num_heads))

    def parts(self) -> Iterator[Part]:
        """About `CHUNK` logits for each thread at a time: of images, or windows of one, or heads of one of these."""
        grid, chunk = self.grid, CHUNK * torch.get_num_threads()
        heads = max(1, chunk // grid.tokens**2)
        windows = max(1, heads // grid.num_heads)
        images = max(1, windows // grid.windows)
        for some_images in _split(grid.batch, images):
            for some_windows in _split(grid.windows, windows):
                for some_heads in _split(grid.num_heads, heads):
                    yield self.part(some_images, some_windows, some_heads)

    def weights(self, q: Tensor, k: Tensor, bias: Tensor | None, part: Part, out: Tensor | None = None) -> Tensor:
        """Weights (n, N, N), before dropout, of the queries and keys (n, N, head_dim) of a part."""
        unread = q.new_empty(1, 1, 1)  # beta = 0: the call is there for its factor alpha, which costs nothing
        logits = torch.baddbmm(unread, q, k.mT, beta=0, alpha=self.scale).to(self.wide)
        windows = logits.view(-1, part.end - part.first, part.heads.stop - part.heads.start, *logits.shape[1:])
        if bias is not None:
            windows.add_(bias[part.heads])
        for first, end, place in self.runs[bisect.bisect_right(self.runs, part.first, key=operator.itemgetter(1)) :]:
            if first >= part.end:
                break
            masked = windows[:, max(first, part.first) - part.first : end - part.first]
            masked.add_(self.masks[place])
            masked.sub_(masked.detach().amax(dim=-1, keepdim=True))
            F.threshold(masked, LEAST, -math.inf, inplace=True)
        return torch.softmax(logits, dim=-1, out=out)

    def drop(self, weights: Tensor, left: Tensor | None, part: Part) -> Tensor:
        """Dropout of weights (n, N, N), or, which is the same, of their gradient: those in `left` are left."""
        return weights if left is None else weights * left[part.sequences] * self.factor

    def cosine(self, q: Tensor, k: Tensor, logit_scale: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Queries and keys of a part whose product is the cosine of the given ones, times `logit_scale`."""
        heads = logit_scale.to(self.wide).view(-1, 1, 1)[part.heads]
        long_q, long_k = cosine(q.view(-1, *heads.shape[:1], *q.shape[1:]), k, heads)
        return long_q.view(q.shape), long_k

    def attend(
        self,
        windows: Tensor,
        bias: Tensor | None,
        logit_scale: Tensor | None,
        left: Tensor | None,
        part: Part,
        out: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """A part (n, N, head_dim), with its weights in `kept`; without `out` and it in operations autograd follows."""
        q, k, v = windows[:, part.sequences]
        if logit_scale is not None:
            q, k = self.cosine(q, k, logit_scale, part)
        weights = self.weights(q, k, bias, part, kept)
        return torch.bmm(self.drop(weights, left, part).to(v.dtype), v, out=out)


def _split(length: int, step: int) -> Iterator[range]:
    return (range(start, min(start + step, length)) for start in range(0, length, step))


def _attend(
    windows: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    left: Tensor | None,
    plan: Plan,
    out: Tensor,
    kept: Tensor | None = None,
) -> Tensor:
    """Attend part by part, with the result in `out`, which may be the queries' memory, and the weights in `kept`."""
    for part in plan.parts():
        here = part.sequences
        plan.attend(windows, bias, logit_scale, left, part, out[here], None if kept is None else kept[here])
    return out


class Attend(torch.autograd.Function):
    """Attention in windows (3, B * windows * heads, N, head_dim) -> (B * windows * heads, N, head_dim).

    Written out so that logits and their gradients pass through the cache a part at a time in training, too. Weights
    are kept for backward where they are not most of what is kept, and made again where they are.
    """

    @staticmethod
    def forward(
        ctx: Any, windows: Tensor, bias: Tensor | None, logit_scale: Tensor | None, left: Tensor | None, plan: Plan
    ) -> Tensor:
        most = plan.grid.tokens > KEPT * windows.shape[-1]
        kept = None if most else windows.new_empty(plan.shape, dtype=plan.wide)
        ctx.plan = plan
        ctx.save_for_backward(windows, bias, logit_scale, left, kept)
        return _attend(windows, bias, logit_scale, left, plan, torch.empty_like(windows[0]), kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        windows, bias, logit_scale, left, kept = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            found = _gradients(windows, bias, logit_scale, left, kept, ctx.plan, grad, needed)
            return (*found, None, None)
        # the gradients are to have gradients
        attended = ctx.plan.attend(windows, bias, logit_scale, left, ctx.plan.everything())
        wanted = [tensor for tensor, need in zip((windows, bias, logit_scale), needed, strict=True) if need]
        gradients = iter(torch.autograd.grad(attended, wanted, grad, create_graph=True))
        return (*(next(gradients) if need else None for need in needed), None, None)


def _gradients(
    windows: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    left: Tensor | None,
    kept: Tensor | None,
    plan: Plan,
    grad: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of `windows`, `bias` and `logit_scale`, part by part."""
    of_windows = torch.empty_like(windows)
    of_bias = torch.zeros_like(bias, dtype=plan.wide) if bias is not None and needed[1] else None
    of_scale = torch.zeros_like(logit_scale) if logit_scale is not None and needed[2] else None
    unread = grad.new_empty(1, 1, 1)
    for part in plan.parts():
        q, k, v = windows[:, part.sequences]
        of_q, of_k, of_v = of_windows[:, part.sequences]
        above = grad[part.sequences]
        if logit_scale is not None:
            leaves = leaf_q, leaf_k, leaf_scale = [tensor.detach().requires_grad_() for tensor in (q, k, logit_scale)]
            with torch.enable_grad():
                scaled = plan.cosine(leaf_q, leaf_k, leaf_scale, part)
            q, k = (tensor.detach() for tensor in scaled)
        weights = plan.weights(q, k, bias, part) if kept is None else kept[part.sequences]

        torch.bmm(plan.drop(weights, left, part).to(v.dtype).mT, above, out=of_v)
        of_weights = plan.drop(torch.bmm(above, v.mT).to(plan.wide), left, part)
        of_logits = torch._softmax_backward_data(of_weights, weights, -1, plan.wide)
        if of_bias is not None:
            own = of_bias[part.heads]
            own.add_(of_logits if len(own) == len(of_logits) else of_logits.view(-1, *own.shape).sum(0))
        of_logits = of_logits.to(v.dtype)
        torch.baddbmm(unread, of_logits, k, beta=0, alpha=plan.scale, out=of_q)
        torch.baddbmm(unread, of_logits.mT, q, beta=0, alpha=plan.scale, out=of_k)
        if logit_scale is not None:
            of_leaves = torch.autograd.grad(scaled, leaves, (of_q, of_k))
            of_q.copy_(of_leaves[0])
            of_k.copy_(of_leaves[1])
            if of_scale is not None:
                of_scale.add_(of_leaves[2])
    return of_windows, None if bias is None or of_bias is None else of_bias.to(bias.dtype), of_scale
