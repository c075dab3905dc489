"""Apply rules to keys and tensors, in either direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError
from .report import some
from .rules import Facts, Rule, template


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
    keys: Iterable[str], rules: Sequence[Rule], side: str, last: int | None = None
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
    key: str, rules: Sequence[Rule], side: str, last: int | None
) -> Iterator[tuple[Rule, int, dict[str, Any]]]:
    """The rules that match a key, with the position of the part that does and the numbers in it."""
    for rule in rules:
        for position, part in enumerate(getattr(rule, side)):
            values = part.key and template(part.key).match(key)
            if values is not None and values.get("last", last) == last:
                yield rule, position, values


def repacked(group: Group, tensors: list[Tensor | None], side: str, last: int, facts: Facts) -> dict[str, Tensor]:
    """The group's tensors under its keys of the other side, `side`."""
    source = group.rule.theirs if side == "ours" else group.rule.ours
    target = getattr(group.rule, side)
    keys = [part.key and template(part.key).fill({**group.values, "last": last}) for part in target]
    if len(source) == len(target) == 1:
        change = group.rule.tensors
        if change is not None:
            apply = change.inward if side == "ours" else change.outward
            try:
                return {keys[0]: apply(tensors[0], facts).contiguous()}
            except (RuntimeError, IndexError) as error:
                shape = tuple(tensors[0].shape)
                raise WeightsError(f"{group.keys[0]} has the shape {shape}, which its layout does not have") from error
        return {keys[0]: tensors[0]}
    rows = _packed_rows(group, tensors, source)
    unit, rest = divmod(len(rows), sum(part.share for part in target))
    if rest:
        names = some([key for key in keys if key])
        raise WeightsError(f"{some(group.keys)} has {len(rows)} rows, which do not divide into {names}")
    pieces = rows.split([unit * part.share for part in target])
    # clones: safetensors refuses tensors that share memory
    return {key: piece.clone() for key, piece in zip(keys, pieces, strict=True) if key}


def _packed_rows(group: Group, tensors: list[Tensor | None], source: Sequence) -> Tensor:
    like, share = next((t, part.share) for t, part in zip(tensors, source, strict=True) if t is not None)
    filled = [
        like.new_zeros(len(like) // share * part.share, *like.shape[1:]) if tensor is None else tensor
        for tensor, part in zip(tensors, source, strict=True)
    ]
    try:
        return torch.cat(filled)
    except RuntimeError as error:
        raise WeightsError(f"the shapes of {some(group.keys)} do not fit together") from error
