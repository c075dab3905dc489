"""The report of a run: one HTML file that needs no other."""

from __future__ import annotations

import base64
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from hvt_backbones import __version__
from hvt_backbones.atomic import whole_file
from hvt_backbones.doctor import installed_version

from ..checkpoint.files import CURVES, RECONSTRUCTIONS, REPORT
from ..checkpoint.manager import revision
from ..config import Config
from .log import duration

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "torch_npu", "deepspeed", "numpy", "pillow")
NAMES_SHOWN = 200  # unreadable pictures; the page stays small
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
img { max-width: 100% }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top }
.epochs td, .epochs th { text-align: right }
.muted, th { color: #777; font-weight: normal }
.warning { color: #a33c00 }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1rem 0 }
dt { color: #777; font-size: .85rem } dd { margin: 0; font-size: 1.4rem }
.scroll { overflow-x: auto }
"""


def write_report(
    folder: Path,
    *,
    metrics: Mapping[str, Any],
    history: Sequence[Mapping[str, float]],
    config: Config,
    title: str,
    unreadable: Sequence[str] = (),
) -> None:
    """Write `report.html`: final figures, curves, what was skipped, every epoch, settings and versions.

    Args:
        folder: of the run; `curves.png` in it becomes part of the page.
        metrics: contents of `metrics.json`.
        history: one row per epoch, the columns of `log.csv`.
        config: of the run.
        title: the page's heading.
        unreadable: names of the pictures that were passed over.
    """
    best, last = metrics["best"], metrics["last"]
    figures = {
        **_accuracy("best top-1", best, "top1"),
        **_accuracy("its top-5", best, "top5"),
        **({} if "top1" in best else {"best held-out loss": f"{best['val_loss']:.4f}"}),
        "in epoch": f"{best['epoch']} of {metrics['epochs']}",
        **_accuracy("last top-1", last, "top1"),
        "last held-out loss": f"{last['val_loss']:.4f}",
        "time": duration(metrics["train_seconds"]),
        "speed": f"{history[-1]['images_per_second']:.0f} images/s",
    }
    page = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, {escape(str(folder))}</p>',
        "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()) + "</dl>",
        _skipped(metrics, unreadable),
        _image(folder / CURVES, "Loss, accuracy and learning rate over the epochs"),
        *_reconstruction(folder),
        "<h2>Epochs</h2>",
        _epochs(history, best["epoch"]),
        '<h2>Settings</h2><p class="muted">Bold: not the default.</p>',
        _settings(config),
        "<h2>Versions</h2>",
        _table(_versions().items()),
        "<h2>All final figures</h2>",
        _table((name, _text(value)) for name, value in _flat(metrics)),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    text = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(page) + "\n</body></html>\n"
    with whole_file(folder / REPORT) as path:
        path.write_text(text, encoding="utf-8")


def _accuracy(what: str, row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {what: f"{row[name]:.2f} %"} if name in row else {}


def _image(path: Path, alt: str) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _reconstruction(folder: Path) -> list[str]:
    """The newest picture of a run of SimMIM."""
    drawn = sorted((folder / RECONSTRUCTIONS).glob("epoch_*.png"))
    if not drawn:
        return []
    alt = "Pictures, what is seen of them, what is painted"
    return [f"<h2>{alt}, in epoch {int(drawn[-1].stem.removeprefix('epoch_'))}</h2>", _image(drawn[-1], alt)]


def _skipped(metrics: Mapping[str, Any], unreadable: Sequence[str]) -> str:
    """What the run went on without; said also where it is nothing."""
    steps, pictures = metrics["skipped_steps"], len(unreadable) or metrics["unreadable"]
    if not steps and not pictures:
        return "<p>No step and no picture was skipped.</p>"
    text = f'<p class="warning">{steps} steps were skipped, {pictures} pictures could not be read.</p>'
    if unreadable:
        names = "".join(f"<li>{escape(name)}</li>" for name in unreadable[:NAMES_SHOWN])
        more = f"<li>and {len(unreadable) - NAMES_SHOWN} more</li>" if len(unreadable) > NAMES_SHOWN else ""
        text += f"<details><summary>The pictures</summary><ul>{names}{more}</ul></details>"
    return text


def _epochs(history: Sequence[Mapping[str, float]], best: float) -> str:
    columns = list(history[-1])
    header = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = []
    for row in history:
        weight = ' style="font-weight: bold"' if row["epoch"] == best else ""
        rows.append(f"<tr{weight}>" + "".join(f"<td>{_text(row.get(name, ''))}</td>" for name in columns) + "</tr>")
    return f'<div class="scroll"><table class="epochs"><tr>{header}</tr>{"".join(rows)}</table></div>'


def _settings(config: Config) -> str:
    rows = []
    for section, values in config.as_dict().items():
        settings = getattr(config, section)
        for name, known in settings.__pydantic_fields__.items():
            value = yaml.safe_dump(values[name], default_flow_style=True, width=10_000, allow_unicode=True)
            value = escape(value.removesuffix("...\n").strip())
            key = f"{section}.{name}"
            changed = getattr(settings, name) != known.default
            rows.append((f"<b>{key}</b>", f"<b>{value}</b>") if changed else (key, value))
    return _table(rows)


def _versions() -> dict[str, str]:
    found = {name: installed_version(name) for name in PACKAGES}
    return {
        "git revision": escape(revision() or "not in a checkout"),
        "hvt_backbones": __version__,
        "python": platform.python_version(),
        "system": escape(f"{platform.system()} {platform.machine()}"),
        **{name: escape(version) for name, version in found.items() if version is not None},
    }


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else escape(str(value))


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Of names and values that are HTML already."""
    return "<table>" + "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows) + "</table>"
