"""The language of the layout tables: key templates and rules, and their use on keys and tensors in both directions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import WeightsError
from .report import some

Side = Literal["theirs", "ours"]

PLACEHOLDER = re.compile(r"\{(\d*)([a-z]+)([+-]\d+)?\}")


class Template:
    """A key with places: `{p}` is weight or bias, any other name a number, as `{s}`, `{s+1}` or `{2s+1}`.

    `match` finds the values of the names in a key, `fill` puts them into the key.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.places: list[tuple[str, int, int]] = []
        pattern, end = "", 0
        for place in PLACEHOLDER.finditer(text):
            factor, name, offset = place.groups()
            self.places.append((name, int(factor or 1), int(offset or 0)))
            pattern += re.escape(text[end : place.start()])
            pattern += "(weight|bias)" if name == "p" else r"(0|[1-9]\d*)"
            end = place.end()
        self.pattern = re.compile(pattern + re.escape(text[end:]))

    def match(self, key: str) -> dict[str, Any] | None:
        """The values with which `fill` gives `key`; None where there are none."""
        found = self.pattern.fullmatch(key)
        if found is None:
            return None
        values: dict[str, Any] = {}
        for (name, factor, offset), text in zip(self.places, found.groups(), strict=True):
            if name == "p":
                values[name] = text
                continue
            values[name], rest = divmod(int(text) - offset, factor)
            if rest or values[name] < 0:
                return None
        return values

    def fill(self, values: Mapping[str, Any]) -> str:
        numbers = {(n, f, o): values[n] if n == "p" else f * values[n] + o for n, f, o in self.places}
        filled = (str(numbers[place]) for place in self.places)
        return PLACEHOLDER.sub(lambda _: next(filled), self.text)


template = functools.cache(Template)


class Part(NamedTuple):
    """A key's share of the rows (axis 0) of a packed tensor. Without a key: zeros, which are not stored."""

    key: str | None
    share: int = 1


class TensorRule(NamedTuple):
    """A change of the tensor itself, inwards (theirs to ours) and outwards."""

    inward: Callable[[Tensor, Facts], Tensor]
    outward: Callable[[Tensor, Facts], Tensor]


@dataclass(frozen=True)
class Facts:
    """What a tensor rule may need to know beside the tensor.

    Attributes:
        style: "classifier", "dense" or "simmim": which of a layout's kinds of model it is.
        grid: height and width of the absolute position embedding, where they are known.
    """

    style: str
    grid: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rule:
    """Their keys and ours for the same numbers.

    Where there are several parts on either side, the tensors are rows of one packed tensor.

    Attributes:
        tensors: how the tensor changes; only where there is one part on either side.
        style: the rule is for this kind of model only; one for classifiers is for SimMIM too, which has their norm.
        outer: their key lies outside the module that holds the backbone, such as the classification layer beside it.
    """

    theirs: tuple[Part, ...]
    ours: tuple[Part, ...]
    tensors: TensorRule | None = None
    style: str | None = None
    outer: bool = False

    def is_for(self, style: str) -> bool:
        return self.style in (None, style, "classifier" if style == "simmim" else style)


def rule(
    theirs: str, ours: str, tensors: TensorRule | None = None, *, style: str | None = None, outer: bool = False
) -> Rule:
    """One key for one key."""
    return Rule((Part(theirs),), (Part(ours),), tensors, style, outer)


Rows = Iterable[tuple[str, str]]


def rules(theirs: str, ours: str, rows: Rows) -> list[Rule]:
    """Rules whose keys share a beginning on either side."""
    return [rule(theirs + a, ours + b) for a, b in rows]


def same(*keys: str) -> list[tuple[str, str]]:
    """Rows of keys that are the same on either side."""
    return [(key, key) for key in keys]


def packed(theirs: Iterable[Part], ours: Iterable[Part]) -> Rule:
    """Tensors that are rows of one tensor on either side."""
    return Rule(tuple(theirs), tuple(ours))


@dataclass(frozen=True, eq=False)
class Layout:
    """How one code base names the tensors of one family.

    Attributes:
        anchor: a key that every model of it has; what stands before it in a file is the wrapper.
        axes: of the convolution at the anchor: 3 for video, whose keys are otherwise those of images.
        requires: further templates that tell the families of a code base apart; each must match a key.
        marks, unlike: one of the first must be there and none of the second for the layout to be recognised among
            those that share its other keys; not asked where it is named.
        rules: the first that matches a key holds, in either direction. None: the keys are ours.
        buffers: what follows from the window and is in the state dict of their code: key, with the stage `{s}` and the
            block `{b}` -> "index" (N, N) or "flat index" (N * N,): `relative_position_index` of a window of N tokens;
            "coordinates" (1, 2h - 1, 2w - 1, 2): `relative_coords_table` of SwinV2.
        wrapper: style -> what their code puts before the keys of the backbone.
        reads_only: an older way to write the layout; `convert_state_dict` does not write it.
    """

    name: str
    family: str
    anchor: str
    requires: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    rules: tuple[Rule, ...] | None = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    wrapper: Mapping[str, str] = field(default_factory=dict)
    reads_only: bool = False
    axes: int = 2


@dataclass
class Group:
    """The keys that one rule takes together, for one set of numbers; `parts` has None for stored-nowhere zeros."""

    rule: Rule
    values: dict[str, Any]
    parts: list[str | None]

    @property
    def keys(self) -> list[str]:
        return [key for key in self.parts if key is not None]


def grouped(
    keys: Iterable[str], rules: Sequence[Rule], side: Side, last: int | None = None
) -> tuple[list[Group], list[str]]:
    """The keys, each with the first rule that matches it on `side`, and those that no rule matches."""
    groups: dict[tuple, Group] = {}
    unmatched = []
    for key in keys:
        found = next(_matches(key, rules, side, last), None)
        if found is None:
            unmatched.append(key)
            continue
        rule, position, values = found
        empty = Group(rule, values, [None] * len(getattr(rule, side)))
        groups.setdefault((id(rule), *values.items()), empty).parts[position] = key
    for group in groups.values():
        parts = zip(getattr(group.rule, side), group.parts, strict=True)
        missing = [template(part.key).fill(group.values) for part, key in parts if part.key and key is None]
        if missing:
            raise WeightsError(
                f"{some(group.keys)} lacks {some(missing)}, which belongs to it: the weights are incomplete"
            )
    return list(groups.values()), unmatched


def _matches(
    key: str, rules: Sequence[Rule], side: Side, last: int | None
) -> Iterator[tuple[Rule, int, dict[str, Any]]]:
    """The rules that match a key, with the position of the part that does and the numbers in it."""
    for rule in rules:
        for position, part in enumerate(getattr(rule, side)):
            values = part.key and template(part.key).match(key)
            if values is not None and values.get("last", last) == last:
                yield rule, position, values


def repacked(group: Group, tensors: Mapping[str, Tensor], side: Side, last: int, facts: Facts) -> dict[str, Tensor]:
    """The group's tensors under its keys of the other side, `side`."""
    rule = group.rule
    source, target = (rule.theirs, rule.ours) if side == "ours" else (rule.ours, rule.theirs)
    keys = [part.key and template(part.key).fill({**group.values, "last": last}) for part in target]
    if len(source) == len(target) == 1:
        tensor = tensors[group.keys[0]]
        if rule.tensors is not None:
            change = rule.tensors.inward if side == "ours" else rule.tensors.outward
            try:
                tensor = change(tensor, facts).contiguous()
            except (RuntimeError, IndexError) as error:
                shape = tuple(tensor.shape)
                raise WeightsError(f"{group.keys[0]} has the shape {shape}, which its layout does not have") from error
        return {key: tensor for key in keys if key}
    rows = _packed_rows(group, tensors, source)
    unit, rest = divmod(len(rows), sum(part.share for part in target))
    if rest:
        names = some([key for key in keys if key])
        raise WeightsError(f"{some(group.keys)} has {len(rows)} rows, which do not divide into {names}")
    pieces = rows.split([unit * part.share for part in target])
    # clones: safetensors refuses tensors that share memory
    return {key: piece.clone() for key, piece in zip(keys, pieces, strict=True) if key}


def _packed_rows(group: Group, tensors: Mapping[str, Tensor], source: Sequence[Part]) -> Tensor:
    parts = list(zip(group.parts, (part.share for part in source), strict=True))
    like, like_share = next((tensors[key], share) for key, share in parts if key is not None)
    try:
        unit = len(like) // like_share
        return torch.cat(
            [like.new_zeros(unit * share, *like.shape[1:]) if key is None else tensors[key] for key, share in parts]
        )
    except (RuntimeError, TypeError) as error:  # the second is of a number without rows
        raise WeightsError(f"the shapes of {some(group.keys)} do not fit together") from error
