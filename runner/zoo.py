"""The configurations of an application as a table: what a name means, the configuration itself, the README's tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvt_backbones.errors import InputError, nearest
from hvt_backbones.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from mmengine.config import Config

LETTERS = {"tiny": "t", "small": "s", "base": "b", "large": "l"}
# of the models that are named here: family and size, then what follows the size
NAMES = re.compile(
    r"(?P<family>swin|swinv2|twins_pcpvt|twins_svt)_(?P<size>tiny|small|base|large)(?:_(?P<rest>.+))?|pvt_v2_(?P<pvt>.+)"
)
PRETRAINED_22K = "-in22k"


@dataclass(frozen=True)
class Row:
    """A configuration that somebody published, or the nearest to one.

    Attributes:
        name: by the application's grammar: method, backbone, schedule, data.
        drop_path: rate of stochastic depth.
        published: AP, mIoU or accuracies of `source`, as a README prints them; "" if there are none.
        source: who published them, a reference of the README.
        counts: parameters (M) counted; published; FLOPs (G) counted; published; as a README prints them.
        follows: whose settings it has; {} stands for the backbone.
        differs: what differs from the recipes, dotted key -> value.
    """

    name: str
    drop_path: float
    published: str
    source: str
    counts: str
    follows: str
    differs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of a README: its title, the names in it, and what its first columns are called."""

    title: str
    names: str  # a regular expression
    columns: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """
    Attributes:
        rows: the table.
        grammar: of a name; its groups are the parts that `build` takes.
        build: makes the configuration of a name's parts, and of its row where it has one.
        label: of a name's parts: the first cells of its line in a README.
        tables: of the README.
    """

    rows: tuple[Row, ...]
    grammar: re.Pattern[str]
    build: Callable[[Mapping[str, str], Row | None], Config]
    label: Callable[[Mapping[str, str]], tuple[str, ...]]
    tables: tuple[Table, ...]

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def config(self, name: str) -> Config:
        """The configuration of a name, with or without `.py`.

        Raises:
            InputError: it is no name; the message has the nearest.
        """
        name = name.removesuffix(".py")
        parts = self.grammar.fullmatch(name)
        if parts is None:
            raise InputError(f"{name!r} is no name of a configuration; {nearest(name, self.names)}")
        cfg = self.build(parts.groupdict(), self.row(name))
        object.__setattr__(cfg, "_filename", f"{name}.py")  # its own attributes are keys of the configuration
        return cfg

    def follows(self, name: str) -> str:
        """Whose settings a configuration has, in words."""
        row = self.row(name)
        label = self.label(self.grammar.fullmatch(name).groupdict())[0].partition(",")[0]
        if row is None:
            return f"Nobody published {label} so: the settings of its neighbours in the table."
        return row.follows.replace("{}", label)

    def markdown(self) -> str:
        """The tables of the README."""
        return "\n\n".join(self._table(table) for table in self.tables) + "\n"

    def _table(self, table: Table) -> str:
        header = (*table.columns, "Source", "Params (M)", "published", "FLOPs (G)", "published", "Config", "Reproduced")
        lines = [f"### {table.title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for row in self.rows:
            if re.fullmatch(table.names, row.name):
                labels = self.label(self.grammar.fullmatch(row.name).groupdict())
                empty = ("-",) * (len(table.columns) - len(labels))
                cells = (
                    *labels,
                    *(row.published.split() or empty),
                    row.source or "-",
                    *row.counts.split("; "),
                    f"`{row.name}`",
                    "",
                )
                lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        return "\n".join(lines)


def compose(folder: Path, recipes: Sequence[str], settings: Mapping[str, Any]) -> Config:
    """The configuration of recipe files below `folder`, each of keys of its own, with settings, dotted key -> value."""
    from mmengine.config import Config

    content: dict[str, Any] = {}
    for recipe in recipes:
        content |= Config.fromfile(folder / f"{recipe}.py", format_python_code=False).to_dict()
    cfg = Config(content, cfg_text=" ")
    cfg.merge_from_dict(dict(settings))
    return cfg


def image_backbones() -> dict[str, Variant]:
    """How configurations name the image models: swin-t-p4-w7, swinv2-b-w8, pvtv2-b2-li, twins-svt-s."""
    found: dict[str, Variant] = {}
    for variant in VARIANTS.values():
        if (match := NAMES.fullmatch(variant.name)) is None:
            continue
        if match["pvt"]:
            found.setdefault(f"pvtv2-{match['pvt'].replace('_', '-')}", variant)
            continue
        kind = f"{match['family'].replace('_', '-')}-{LETTERS[match['size']]}"
        if match["family"] == "swin":
            kind += f"-p4-w{variant.arch['window_size']}"
        elif match["family"] == "swinv2":
            kind += "-w" + re.match(r"window(\d+(?:to\d+)?)", match["rest"])[1]
        found.setdefault(kind, variant)
    return found


def image_backbone(token: str) -> tuple[Variant, str]:
    """The model and the weights that a configuration names: swin-b-p4-w7-in22k.

    Raises:
        InputError: there is no such model, or it has no weights of ImageNet-22K.
    """
    known, plain = image_backbones(), token.removesuffix(PRETRAINED_22K)
    if plain not in known:
        raise InputError(f"no backbone is called {token!r} in configurations; {nearest(plain, list(known))}")
    variant = known[plain]
    tag = "in22k" if plain != token else "in1k" if "in1k" in variant.tags else variant.tags[0]
    if tag not in variant.tags:
        raise InputError(f"{token!r}: {variant.name} has no weights {tag}; it has {', '.join(variant.tags)}")
    return variant, tag


def image_label(token: str) -> str:
    """As a README calls it: Swin-T, SwinV2-B, PVTv2-B2-Li, Twins-PCPVT-S; of ImageNet-22K with ", 22K"."""
    kind, *rest = token.removesuffix(PRETRAINED_22K).split("-")
    names = {"swin": "Swin", "swinv2": "SwinV2", "pvtv2": "PVTv2", "twins": "Twins"}
    shown = {"pvtv2": [part.capitalize() for part in rest], "twins": [part.upper() for part in rest]}
    label = "-".join([names[kind], *shown.get(kind, [rest[0].upper()])])
    return f"{label}, 22K" if token.endswith(PRETRAINED_22K) else label


def nearest_drop_path(rows: Sequence[Row], grammar: re.Pattern[str], parts: Mapping[str, str]) -> float:
    """Of a combination that is no row: that of the row with the nearest backbone, of them with the nearest method."""
    variant = image_backbone(parts["backbone"])[0]

    def distance(row: Row) -> tuple[bool, ...]:
        other = grammar.fullmatch(row.name)
        theirs = image_backbone(other["backbone"])[0]
        same = [other[key] == parts[key] for key in ("method", "schedule")]
        return variant.family != theirs.family, _size(variant) != _size(theirs), *(not one for one in same)

    return min(rows, key=distance).drop_path


def _size(variant: Variant) -> str:
    match = NAMES.fullmatch(variant.name)
    return match["size"] or match["pvt"]
