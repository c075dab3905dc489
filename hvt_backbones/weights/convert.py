"""Read a state dict of any known layout into our names, and write ours into any layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backbone import sides
from ..errors import WeightsError
from ..layers.window_attention import relative_coordinates, relative_position_index
from ..swin import windows_per_stage
from .files import find_weights
from .keymap import Facts, Layout, Rule, grouped, repacked, template
from .layouts import ALL, around_of, canonical_name, find_layout, recognise
from .position_windows import PositionWindows
from .report import some
from .resize import square_window

# Buffers that a model computes from sizes; `attn_mask` even depends on the image.
COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")
OF_SIMMIM = "belongs to masked-image pre-training"
# The last part of keys, anywhere, that belong to no model of ours -> why they are there.
FOREIGN = {
    **dict.fromkeys(("total_ops", "total_params"), "a counter of thop"),
    **dict.fromkeys(("input_shape", "output_shape", "parameter_quantity"), "a counter of torchstat"),
    **dict.fromkeys(("inference_memory", "MAdd", "duration", "Flops", "Memory"), "a counter of torchstat"),
}
OUR_STAGE = template("stages.{s}.blocks.{b}.attn.proj.weight")
OUR_TABLE = template("stages.{s}.blocks.{b}.attn.position_bias.table")
OUR_HEAD = template("head.{p}")
OUR_SIMMIM = ("mask_token", "decoder.weight", "decoder.bias")


@dataclass
class Checkpoint:
    """A state dict in our names.

    Attributes:
        layout, wrapper: what it was, and what stood before the keys of the backbone.
        style: see `Facts`.
        given: the state dict as it was.
        tensors: our key, without `backbone.`, -> tensor.
        sources: our key -> the keys that it came from.
        computed: their buffers that a model computes.
        dropped: their key -> why it is not part of the backbone or its head.
        unknown: their keys without a rule.
        inflated: our key -> how it was brought from images to video.
        position_windows: of a SwinV2, the windows that its position biases were learned for, where they are known.
    """

    layout: Layout
    wrapper: str
    style: str = "dense"
    given: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    computed: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    inflated: dict[str, str] = field(default_factory=dict)
    position_windows: PositionWindows | None = None

    @property
    def stages(self) -> int:
        return 1 + max((int(key.split(".")[1]) for key in self.tensors if key.startswith("stages.")), default=-1)

    @property
    def classes(self) -> int:
        """Rows of the head; 0 where there is none."""
        head = self.tensors.get("head.weight")
        return len(head) if head is not None and head.dim() else 0


def convert_state_dict(
    state_dict: Mapping[str, Any],
    *,
    to: str,
    layout: str = "auto",
    window_size: int | Sequence[Any] | None = None,
    pretrained_window_size: int | Sequence[Any] = 0,
    ape_size: int | tuple[int, int] | None = None,
    whole: bool = False,
) -> dict[str, Tensor]:
    """Rename and rearrange weights from one code base's layout to another's.

    Buffers that the target's own code stores are computed where the window is known, so that it loads the result with
    `strict=True`, except `attn_mask` of the official Swin, which depends on the image size.

    Args:
        state_dict: key -> tensor, of a backbone, a classifier or a larger model around it; also under `model`,
            `state_dict` and the like, or behind prefixes such as `module.` and `backbone.`. It is not changed, and
            the result shares memory with it where a tensor stays as it is.
        to: "hvt" (this library), "official", "timm", "mmpretrain", "mmdet" (or "mmseg"), "mmaction2", "torchvision"
            or "huggingface" (the modules of transformers 5).
        layout: what `state_dict` is; recognised by its keys by default.
        window_size: of the model, one side, (height, width), for video (frames, height, width), or one of these per
            stage. Without it the buffers of SwinV2 are taken over where the state dict has them, those of Swin follow
            from its tables where the windows are square, and others are left out.
        pretrained_window_size: of SwinV2, given alike, for the same buffers.
        ape_size: grid of an absolute position embedding that is stored as tokens and is not square.
        whole: keep a detector's or segmentor's other parts as they are, and the backbone under its prefix there. By
            default they are left out.

    Raises:
        InputError: a window or `ape_size` that is no size.
        WeightsError: the layout is not recognised, does not have the family, or keys have no place in it.
    """
    canonical_name(to)
    checkpoint = read_checkpoint(find_weights(state_dict).tensors, layout, ape_size=ape_size)
    return write_checkpoint(checkpoint, to, window_size, pretrained_window_size, whole=whole)


def read_checkpoint(
    tensors: Mapping[str, Tensor],
    layout: str = "auto",
    *,
    layouts: Sequence[Layout] = ALL,
    ape_size: int | Sequence[int] | None = None,
) -> Checkpoint:
    """Bring a state dict into our names.

    Raises:
        InputError: `ape_size` is no size.
        WeightsError: the layout is not recognised, or tensors do not fit its rules.
    """
    grid = None if ape_size is None else sides(ape_size, 2, "ape_size")
    table, prefix = recognise(tensors, layout, layouts)
    result = Checkpoint(table, prefix, given=tensors)
    around = around_of(prefix)
    inner, outer = {}, {}
    for key in tensors:
        if key.rpartition(".")[2] in COMPUTED:
            result.computed.append(key)
        elif reason := FOREIGN.get(key.rpartition(".")[2]):
            result.dropped[key] = reason
        elif key.startswith(prefix):
            inner[key.removeprefix(prefix)] = key
        else:
            outer[key.removeprefix(around)] = key
    if table.rules is None:
        _take_ours(result, inner, outer)
    else:
        _translate(result, inner, outer, grid)
        result.position_windows = _position_windows(result)
    return result


def _take_ours(result: Checkpoint, inner: dict[str, str], outer: dict[str, str]) -> None:
    everything = inner | outer
    simmim = set(OUR_SIMMIM) <= everything.keys()
    for key, theirs in everything.items():
        if key == "mask_token" and not simmim:
            result.dropped[theirs] = OF_SIMMIM
        elif key in inner or OUR_HEAD.match(key) or (simmim and key in OUR_SIMMIM):
            result.tensors[key], result.sources[key] = result.given[theirs], (theirs,)
        else:
            result.dropped[theirs] = f"outside {result.wrapper!r}"
    alone = result.wrapper.endswith("backbone.") and not result.dropped
    classifier = alone or any(map(OUR_HEAD.match, result.tensors))
    result.style = "simmim" if simmim else "classifier" if classifier else "dense"


def _translate(result: Checkpoint, inner: dict[str, str], outer: dict[str, str], grid: tuple[int, ...] | None) -> None:
    rules = result.layout.rules or ()
    groups, unmatched = grouped(inner, [r for r in rules if not r.outer or not result.wrapper], "theirs")
    result.unknown = [inner[key] for key in unmatched if not key.endswith("mask_token")]
    beside, foreign = grouped(outer, [r for r in rules if r.outer], "theirs")
    result.dropped |= {outer[key]: f"outside {result.wrapper!r}" for key in foreign}
    result.dropped |= {inner[key]: OF_SIMMIM for key in unmatched if key.endswith("mask_token")}
    named = [(group, inner) for group in groups] + [(group, outer) for group in beside]
    result.style = _style([group.rule for group, _ in named])
    last = max((group.values["s"] for group, _ in named if "s" in group.values), default=0)
    facts = Facts(result.style, grid)
    for group, names in named:
        theirs = tuple(names[key] for key in group.keys)
        if not group.rule.is_for(result.style):
            reason = OF_SIMMIM if group.rule.style == "simmim" else f"not used by the {result.style} model"
            result.dropped |= dict.fromkeys(theirs, reason)
            continue
        tensors = {key: result.given[names[key]] for key in group.keys}
        for key, tensor in repacked(group, tensors, "ours", last, facts).items():
            if key in result.sources:
                raise WeightsError(f"{some([*result.sources[key], *theirs])} mean the same: remove one of them")
            result.tensors[key] = tensor
            result.sources[key] = theirs


def _style(rules: Sequence[Rule]) -> str:
    """Of the model whose keys these rules matched."""
    of_simmim = {part.key for rule in rules if rule.style == "simmim" for part in rule.ours}
    if len(of_simmim) > 1:  # a mask token alone was left behind
        return "simmim"
    styles = {rule.style for rule in rules}
    return "classifier" if "classifier" in styles and "dense" not in styles else "dense"


def write_checkpoint(
    checkpoint: Checkpoint,
    to: str,
    window_size: int | Sequence[Any] | None = None,
    pretrained_window_size: int | Sequence[Any] = 0,
    *,
    whole: bool = False,
) -> dict[str, Tensor]:
    """What `convert_state_dict` returns, of weights in our names.

    Raises:
        InputError, WeightsError: as `convert_state_dict`.
    """
    table = checkpoint.layout
    if checkpoint.unknown:
        raise WeightsError(
            f"no rule for {some(checkpoint.unknown)} in the {table.name} layout of {table.family}: "
            "remove these keys, or the weights are of another model"
        )
    written = _rewritten(checkpoint, find_layout(to, table.family), window_size, pretrained_window_size)
    # what lies neither under the backbone's prefix nor in a head that belongs to its layout
    heads = {key for sources in checkpoint.sources.values() for key in sources}
    others = {k: t for k, t in checkpoint.given.items() if not k.startswith(checkpoint.wrapper) and k not in heads}
    if not (whole and others):
        return written
    # `HVTBackbone` keeps its weights one level deeper than the backbones whose place it takes
    prefix = checkpoint.wrapper.removesuffix("model.") if table.rules is None else checkpoint.wrapper
    return {**others, **{prefix + key: tensor for key, tensor in written.items()}}


def _rewritten(
    checkpoint: Checkpoint,
    layout: Layout,
    window_size: int | Sequence[Any] | None,
    pretrained_window_size: int | Sequence[Any],
) -> dict[str, Tensor]:
    """In the keys of `layout`, with the buffers that its code stores."""
    axes, stages = checkpoint.layout.axes, checkpoint.stages
    windows = None if window_size is None else windows_per_stage(window_size, stages, axes, least=0)
    pretrained = windows_per_stage(pretrained_window_size, stages, axes, name="pretrained_window_size", least=0)
    wrapper = layout.wrapper.get(checkpoint.style, "")
    if layout.rules is None:
        beside = (key in OUR_SIMMIM or OUR_HEAD.match(key) for key in checkpoint.tensors)
        pairs = zip(checkpoint.tensors.items(), beside, strict=True)
        return {key if outside else wrapper + key: tensor for (key, tensor), outside in pairs}
    rules = [rule for rule in layout.rules if rule.is_for(checkpoint.style)]
    groups, unmatched = grouped(checkpoint.tensors, rules, "ours", stages - 1)
    if unmatched:
        raise WeightsError(
            f"the {layout.name} layout of a {checkpoint.style} {layout.family} has no place for {some(unmatched)}: "
            "leave these keys out"
        )
    facts = Facts(checkpoint.style)
    written: dict[str, Tensor] = {}
    for group in groups:
        prefix = "" if group.rule.outer else wrapper
        moved = repacked(group, checkpoint.tensors, "theirs", stages - 1, facts)
        written |= {prefix + key: tensor for key, tensor in moved.items()}
    written |= {wrapper + key: tensor for key, tensor in _buffers(checkpoint, layout, windows, pretrained)}
    return written


def _buffers(
    checkpoint: Checkpoint,
    layout: Layout,
    windows: Sequence[tuple[int, ...]] | None,
    pretrained_windows: Sequence[tuple[int, ...]],
) -> Iterable[tuple[str, Tensor]]:
    if not layout.buffers:
        return
    for key, weight in checkpoint.tensors.items():
        if (block := OUR_STAGE.match(key)) is None:
            continue
        stage = block["s"]
        coordinates = None if windows else _given_coordinates(checkpoint, block)
        window = windows[stage] if windows else _window(checkpoint, block, coordinates)
        if window is None:
            continue
        table = checkpoint.tensors.get(OUR_TABLE.fill(block))
        rows = math.prod(2 * side - 1 for side in window)
        if table is not None and len(table) != rows:
            raise WeightsError(
                f"window_size {window} in stage {stage}: its position table would have {rows} rows, the weights have "
                f"{len(table)}"
            )
        if coordinates is None:
            of_window = relative_coordinates(window, pretrained_windows[stage], torch.device("cpu"))
            coordinates = of_window.view(1, *(2 * side - 1 for side in window), len(window))
        index = relative_position_index(window, window, torch.device("cpu"))
        tokens = math.prod(window)
        tensors = {"index": index.view(tokens, tokens), "flat index": index, "coordinates": coordinates}
        for buffer, kind in layout.buffers.items():
            yield template(buffer).fill(block), tensors[kind].clone().to(weight.device)


def _given_coordinates(checkpoint: Checkpoint, block: Mapping[str, int]) -> Tensor | None:
    """SwinV2's `relative_coords_table` of a block, where the state dict had it."""
    keys = [template(key).fill(block) for key, kind in checkpoint.layout.buffers.items() if kind == "coordinates"]
    return checkpoint.given.get(checkpoint.wrapper + keys[0]) if keys else None


def _position_windows(checkpoint: Checkpoint) -> PositionWindows | None:
    """By which the coordinates were divided; None where they are not there, or are none of SwinV2's.

    The largest is log2(8 * (side - 1) / (pretrained - 1) + 1) / log2(8).
    """
    windows = []
    for stage in range(checkpoint.stages):
        table = _given_coordinates(checkpoint, {"s": stage, "b": 0})
        if table is None or table.is_meta or table.dim() != 4 or not table.numel():
            return None
        largest = (8 ** table.float().flatten(0, -2).amax(0) - 1).tolist()
        spans = list(zip(table.shape[1:3], largest, strict=True))
        if not all(length == 1 or 0 < most < math.inf for length, most in spans):
            return None
        # of a window of one token the only offset is 0, in the official code 0 / 0
        windows.append(tuple(1 if length == 1 else 1 + round(4 * (length - 1) / most) for length, most in spans))
    return windows


def _window(checkpoint: Checkpoint, block: Mapping[str, int], coordinates: Tensor | None) -> tuple[int, ...] | None:
    """The window of a block as its coordinates or its table of position biases tell, if they do."""
    if coordinates is not None:
        return tuple((side + 1) // 2 for side in coordinates.shape[1:3])
    table = checkpoint.tensors.get(OUR_TABLE.fill(block))
    return None if table is None or checkpoint.layout.axes == 3 else square_window(len(table))
