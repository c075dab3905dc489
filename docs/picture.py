"""`python docs/picture.py`: draw docs/architecture.svg from the imports of the code. A test runs it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection, Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("hvt_backbones", "classification", "detection", "segmentation", "video", "runner", "demos", "soak")
# a row of boxes each, from those that use to those that are used: title -> modules, or packages of them
BASE = "images, files, errors"  # to which no arrows are drawn
COMMANDS = (
    "cli",
    "__main__",
    "predict",
    "reconstruct",
    "transfer",
    "diagnose",
    "plan",
    "step_memory",
    "doctor",
    "npu_doctor",
)
ROWS = (
    {"soak": ("soak",), "demos": ("demos",)},
    {
        "classification": ("classification",),
        "detection": ("detection",),
        "segmentation": ("segmentation",),
        "video": ("video",),
    },
    {"runner": ("runner",)},
    {
        "openmmlab, timm": ("hvt_backbones.openmmlab", "hvt_backbones.timm"),
        "commands": tuple(f"hvt_backbones.{name}" for name in COMMANDS),
    },
    {
        "model files": ("hvt_backbones.model_file",),
        "create, variants": ("hvt_backbones.create", "hvt_backbones.variants"),
        "weights": ("hvt_backbones.weights",),
    },
    {
        "families": tuple(f"hvt_backbones.{name}" for name in ("swin", "pvt_v2", "twins", "video_swin")),
        "backbone, classifier": ("hvt_backbones.backbone", "hvt_backbones.classifier", "hvt_backbones.sharding"),
    },
    {"layers": ("hvt_backbones.layers",), "ops": ("hvt_backbones.ops",)},
    {
        BASE: tuple(
            f"hvt_backbones.{name}"
            for name in ("images", "plots", "device", "processes", "atomic", "errors", "version")
        ),
    },
)
WIDTH, HEIGHT, GAP, MARGIN, BOX = 900, 44, 46, 20, 190
LIBRARY = 3  # the first row of hvt_backbones


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The files of the tree, by the names of their modules."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
        if "configs" not in path.parts
    }


def imported_by(path: Path, module: str, known: Collection[str]) -> set[str]:
    """The modules of `known` that one imports, inside functions too."""
    names = set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}": source for alias in node.names}
            names |= {name if name in known else package for name, package in inner.items()}
    return names & set(known) - {module}


def box_of(module: str) -> str | None:
    """The box of a module; of the library's own `__init__` none."""
    for row in ROWS:
        for title, members in row.items():
            if any(module == member or module.startswith(f"{member}.") for member in members):
                return title
    return None


def arrows() -> Counter[tuple[str, str]]:
    """How many modules of one box import from another."""
    known, found = modules(), Counter()
    for module, path in known.items():
        if module.endswith(".demo"):  # `python -m detection.demo`, which passes on to demos
            continue
        for used in imported_by(path, module, known):
            ends = box_of(module), box_of(used)
            if not {None, BASE} & set(ends) and ends[0] != ends[1]:
                found[ends] += 1
    return found


def draw() -> str:
    """The picture as SVG."""
    places: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(ROWS):
        step = (WIDTH - 2 * MARGIN) / len(row)
        for index, title in enumerate(row):
            places[title] = MARGIN + (index + 0.5) * step, MARGIN + number * (HEIGHT + GAP) + HEIGHT / 2
    height = 2 * MARGIN + len(ROWS) * (HEIGHT + GAP) - GAP + 8
    return "\n".join(["".join(_head(height)), *_arrows(places), *_boxes(places), "</svg>", ""])


def _head(height: float) -> Iterator[str]:
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" font-family="sans-serif">'
    yield '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
    yield 'markerUnits="userSpaceOnUse" orient="auto">'
    yield '<path d="M0 0L8 4L0 8z" fill="#8a94a3"/></marker></defs>'
    yield f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>'
    top = MARGIN / 2 + LIBRARY * (HEIGHT + GAP)
    yield f'<rect x="6" y="{top:g}" width="{WIDTH - 12}" height="{height - top - 6:g}" rx="10" fill="#f1f5fb"/>'
    yield f'<text x="{WIDTH - 16}" y="{height - 14:g}" text-anchor="end" font-size="13" fill="#5d6b80">'
    yield "hvt_backbones: what is installed</text>"


def _arrows(places: dict[str, tuple[float, float]]) -> Iterator[str]:
    for (user, used), count in sorted(arrows().items()):
        (x, y), (to_x, to_y) = places[user], places[used]
        if to_y > y:
            start, end = y + HEIGHT / 2, to_y - HEIGHT / 2
            path = f"M{x:g} {start:g}C{x:g} {(start + end) / 2:g} {to_x:g} {(start + end) / 2:g} {to_x:g} {end - 2:g}"
        else:  # in one row
            side = BOX / 2 if to_x > x else -BOX / 2
            path = f"M{x + side:g} {y:g}L{to_x - side:g} {to_y:g}"
        width = 1 + min(count, 12) / 6
        yield (
            f'<path d="{path}" fill="none" stroke="#8a94a3" stroke-width="{width:.1f}" opacity="0.6" '
            'marker-end="url(#tip)"/>'
        )


def _boxes(places: dict[str, tuple[float, float]]) -> Iterator[str]:
    known = modules()
    for title, (x, y) in places.items():
        own = [path for module, path in known.items() if box_of(module) == title]
        lines = sum(len(path.read_text().splitlines()) for path in own)
        # of hundreds, so that the picture does not change with every line
        size = f"{max(1, round(lines / 100)) * 100:,} lines"
        yield (
            f'<rect x="{x - BOX / 2:g}" y="{y - HEIGHT / 2:g}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#ffffff" '
            'stroke="#3b5b92"/>'
            f'<text x="{x:g}" y="{y - 3:g}" text-anchor="middle" font-size="14" fill="#1d2733">{escape(title)}</text>'
            f'<text x="{x:g}" y="{y + 14:g}" text-anchor="middle" font-size="11" fill="#5d6b80">{size}</text>'
        )


if __name__ == "__main__":
    PICTURE.write_text(draw())
