"""What became of every key of a checkpoint and of a model."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def some(keys: Sequence[str], limit: int = 4) -> str:
    """A few keys, and how many more there are."""
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def shown(value: object) -> str:
    """A value of any kind and length, as part of a line."""
    return " ".join(reprlib.repr(value).split())


def shown_windows(windows: Sequence[tuple[int, ...]]) -> str:
    """As the constructor takes them, in the shortest way."""
    sides = [window[0] if len(set(window)) == 1 else window for window in windows]
    return str(sides[0] if len(set(sides)) == 1 else tuple(sides))


@dataclass
class LoadReport:
    """What `load_weights` did with every key. Printed, it is a short table.

    The lists hold keys of the model; `recomputed`, `dropped` and `unexpected` hold keys of the checkpoint.

    Attributes:
        layout, family: how the checkpoint's keys are named, and its family of models.
        loaded: taken as they are.
        resized: position tables and embeddings brought to another window or grid.
        inflated: an image model's patch embedding and position tables spread over time.
        adapted: the patch embedding of another number of input channels, the head's rows by a class map.
        recomputed: buffers that the model computes itself.
        dropped: left out on purpose.
        initialised: not in the checkpoint, on purpose; they keep their initial values.
        missing: not in the checkpoint, for no known reason.
        unexpected: without a place in the model, for no known reason.
        reasons: name of a list -> key in it -> why.
        pretrained_window_size: what a SwinV2's became by the weights; None where it stayed.
        weights_key: the keys that lead to the weights taken, with dots between; None where they lie at the top.
        other_weights: the keys that lead to further sets of weights, such as a moving average.
    """

    layout: str
    family: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    pretrained_window_size: Sequence[tuple[int, ...]] | None = None
    weights_key: str | None = None
    other_weights: Sequence[str] = ()

    ROWS = ("loaded", "resized", "inflated", "adapted", "recomputed", "dropped", "initialised", "missing", "unexpected")

    def add(self, row: str, keys: Iterable[str], reason: str = "") -> None:
        """Put keys into the list named `row`."""
        keys = list(keys)
        getattr(self, row).extend(keys)
        if reason:
            self.reasons.setdefault(row, {}).update(dict.fromkeys(keys, reason))

    @property
    def ok(self) -> bool:
        """Every key is accounted for, and something was taken."""
        return (
            not self.missing
            and not self.unexpected
            and bool(self.loaded or self.resized or self.inflated or self.adapted)
        )

    def __str__(self) -> str:
        lines = [f"{self.layout} checkpoint of the family {self.family}"]
        if self.other_weights:
            taken = "top level" if self.weights_key is None else repr(self.weights_key)
            lines[0] += f": its {taken}, not {some(self.other_weights)} (weights_key=)"
        for row in self.ROWS:
            by_reason: dict[str, list[str]] = {}
            for key in getattr(self, row):
                by_reason.setdefault(self.reasons.get(row, {}).get(key, ""), []).append(key)
            for reason, keys in by_reason.items():
                lines.append(f"  {row:<12}{len(keys):>5}  {some(keys, 2)}" + (f": {reason}" if reason else ""))
        if self.pretrained_window_size is not None:
            lines.append(f"  pretrained_window_size of the model: {shown_windows(self.pretrained_window_size)}")
        return "\n".join(lines)
