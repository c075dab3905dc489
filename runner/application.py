"""What tells one application of OpenMMLab's frameworks from another: its table of configurations above all.

A configuration has a name of parts: method, backbone, schedule, data. Each row of the table is one that somebody
published, or the nearest to one; any other combination has the settings of its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvt_backbones.errors import InputError, nearest
from hvt_backbones.variants import VARIANTS, Variant

if TYPE_CHECKING:
    from mmengine.config import Config

ROOT = Path(__file__).parents[1]
LETTERS = {"tiny": "t", "small": "s", "base": "b", "large": "l"}
# of the models that are named here: family and size, then what follows the size
NAMES = re.compile(
    r"(?P<family>swin|swinv2|twins_pcpvt|twins_svt)_(?P<size>tiny|small|base|large)(?:_(?P<rest>.+))?|pvt_v2_(?P<pvt>.+)"
)
PRETRAINED_22K = "-in22k"


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        part: of the name, what the others of its table have otherwise; the backbone, as a rule.
        drop_path: rate of stochastic depth.
        published: AP, mIoU or accuracies of `source`, as a README prints them; "" if there are none.
        source: who published them, a reference of the README.
        counts: parameters (M) counted; published; FLOPs (G) counted; published; as a README prints them.
        follows: whose settings it has; {} stands for the backbone.
        differs: what differs from the recipes, dotted key -> value.
    """

    part: str
    drop_path: float
    published: str
    source: str
    counts: str
    follows: str
    differs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Configurations of one method and schedule: title, names ({} stands for a row's part), the first columns."""

    title: str
    names: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def image_label(parts: Mapping[str, str]) -> tuple[str]:
    """The backbone as a README calls it: Swin-T, PVTv2-B2-Li, Twins-PCPVT-S; of ImageNet-22K with ", 22K"."""
    kind, *rest = parts["backbone"].removesuffix(PRETRAINED_22K).split("-")
    names = {"swin": "Swin", "swinv2": "SwinV2", "pvtv2": "PVTv2", "twins": "Twins"}
    shown = {"pvtv2": [part.capitalize() for part in rest], "twins": [part.upper() for part in rest]}
    label = "-".join([names[kind], *shown.get(kind, [rest[0].upper()])])
    return (f"{label}, 22K" if parts["backbone"].endswith(PRETRAINED_22K) else label,)


@dataclass(frozen=True, kw_only=True)
class Application:
    """
    Attributes:
        name: of the package of commands: "detection".
        scope: of the framework: "mmdet", "mmseg" or "mmaction".
        layout: of the standard data set, in words.
        amp_part: the submodule that bf16 is for, "" for the whole model.
        shape: (height, width) at which FLOPs are published; of a video (frames, height, width).
        tables: of its README.
        grammar: of a configuration's name; its groups are the parts that `build` takes.
        build: makes the configuration of a name's parts, and of its row where it has one.
        label: of a name's parts: the first cells of its line in a README.
        adapt: changes a configuration that was read, for train and test.
    """

    name: str
    scope: str
    layout: str
    amp_part: str
    shape: tuple[int, ...]
    tables: tuple[Table, ...]
    grammar: re.Pattern[str]
    build: Callable[[Mapping[str, str], Row | None], Config]
    label: Callable[[Mapping[str, str]], tuple[str, ...]] = image_label
    adapt: Callable[[Any], None] = lambda cfg: None

    @cached_property
    def rows(self) -> dict[str, Row]:
        """By their names."""
        return named_rows(self.tables)

    def config(self, name: str) -> Config:
        """The configuration of a name, with or without `.py`.

        Raises:
            InputError: it is no name; the message has the nearest.
        """
        name = name.removesuffix(".py")
        parts = self.grammar.fullmatch(name)
        if parts is None:
            raise InputError(f"{name!r} is no name of a configuration; {nearest(name, list(self.rows))}")
        cfg = self.build(parts.groupdict(), self.rows.get(name))
        object.__setattr__(cfg, "_filename", f"{name}.py")  # its own attributes are keys of the configuration
        return cfg

    def follows(self, row: str) -> str:
        """Whose settings the configuration of this name has, in words."""
        return self.rows[row].follows.replace("{}", self._labels(row)[0].partition(",")[0])

    def markdown(self) -> str:
        """The tables of the README."""
        return "\n\n".join(map(self._markdown, self.tables)) + "\n"

    def _markdown(self, table: Table) -> str:
        header = (*table.columns, "Source", "Params (M)", "published", "FLOPs (G)", "published", "Config", "Reproduced")
        lines = [f"### {table.title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        for name, row in named_rows([table]).items():
            labels = self._labels(name)
            published = row.published.split() or ["-"] * (len(table.columns) - len(labels))
            cells = (*labels, *published, row.source or "-", *row.counts.split("; "), f"`{name}`")
            lines.append(f"| {' | '.join(cells)} | |")
        return "\n".join(lines)

    def _labels(self, row: str) -> tuple[str, ...]:
        return self.label(self.grammar.fullmatch(row).groupdict())


def named_rows(tables: Sequence[Table]) -> dict[str, Row]:
    return {table.names.replace("{}", row.part): row for table in tables for row in table.rows}


def compose(application: str, recipes: Sequence[str], settings: Mapping[str, Any]) -> Config:
    """The configuration of an application's recipes, each of keys of its own, with settings, dotted key -> value."""
    from mmengine.config import Config

    content: dict[str, Any] = {}
    for recipe in (*recipes, "default_runtime"):
        path = ROOT / application / "configs/_base_" / f"{recipe}.py"
        content |= Config.fromfile(path, format_python_code=False).to_dict()
    cfg = Config(content, cfg_text=" ")
    cfg.merge_from_dict(dict(settings))
    return cfg


# ---- names of image models ----


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


def image_settings(
    tables: Sequence[Table],
    grammar: re.Pattern[str],
    parts: Mapping[str, str],
    row: Row | None,
    official: Sequence[str],
) -> tuple[Variant, dict[str, Any]]:
    """The model of a configuration, and the settings of its backbone.

    Args:
        tables, grammar: of the application.
        parts, row: of the configuration; a combination that is no row has the drop path of the row with the nearest
            backbone, of them with the nearest method.
        official: families whose published checkpoints compute as in their authors' code, not as in OpenMMLab's.
    """
    variant, tag = image_backbone(parts["backbone"])

    def distance(named: tuple[str, Row]) -> tuple[bool, ...]:
        other = grammar.fullmatch(named[0])
        theirs = image_backbone(other["backbone"])[0]
        same = [other[key] == parts[key] for key in ("method", "schedule")]
        return variant.family != theirs.family, _size(variant) != _size(theirs), *(not one for one in same)

    row = row or min(named_rows(tables).items(), key=distance)[1]
    backbone = {"name": variant.name, "pretrained": tag, "drop_path_rate": row.drop_path}
    if variant.family in official:
        backbone["style"] = "official"
    return variant, backbone


def _size(variant: Variant) -> str:
    match = NAMES.fullmatch(variant.name)
    return match["size"] or match["pvt"]
