"""Curves and report of a run, from figures that no run has to make first."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from classification.checkpoint.files import CURVES, REPORT
from classification.command_line import parse_command_line
from classification.reporting.curves import plot_curves
from classification.reporting.page import write_report

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Text, images, addresses, and a check that every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def rows(epochs: int, **changes: float) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch, "step": 40 * epoch, "train_loss": 2.5 * 0.9**epoch, "lr": 1e-3 / epoch,
            "images_per_second": 123.0, "ms_per_step": 8.1, "val_loss": 2.0 * 0.9**epoch,
            "top1": 90 - 80 * 0.8**epoch, "top5": 99 - 50 * 0.8**epoch, "val_images": 500, "val_correct": 400,
            "seconds": 61.5, "skipped_steps": 0, "unreadable": 0, **changes,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def metrics_of(history: list[dict[str, float]], **changes: Any) -> dict[str, Any]:
    best = max(history, key=lambda row: row["top1"])
    return {
        "model": "swin_tiny", "epochs": len(history), "steps": history[-1]["step"], "best": best, "last": history[-1],
        "train_seconds": 3725.0, "skipped_steps": 0, "unreadable": 0, **changes,
    }  # fmt: skip


def report(folder: Path, history: list[dict[str, float]], **arguments: Any) -> tuple[str, Page]:
    plot_curves(history, folder / CURVES, title="a run")
    config = parse_command_line(["digits", "--lr", "0.0123", "--output-dir", str(folder)])
    given = {"metrics": metrics_of(history), "title": "swin_tiny, 10 classes"} | arguments
    write_report(folder, history=history, config=config, **given)
    text = (folder / REPORT).read_text(encoding="utf-8")
    return text, Page(text)


def test_report_says_everything_in_one_file(tmp_path: Path) -> None:
    text, page = report(tmp_path, rows(12))
    for expected in (
        "swin_tiny, 10 classes", "best top-1 84.50 %", "in epoch 12 of 12", "time 1 h 2 min", "speed 123 images/s",
        "No step and no picture was skipped.", "optimizer.lr 0.0123", "model.name swinv2_tiny_window8", "train.seed 0",
        "git revision", "torch ", "hvt_backbones ", "best.val_correct 400", "train_loss",
    ):  # fmt: skip
        assert expected in page.text
    assert "<b>optimizer.lr</b>" in text  # of the command line
    assert "<b>train.seed</b>" not in text  # the default
    assert text.count("<tr><td>") >= 80
    assert len(re.findall("<tr[^>]*><td>\\d+</td><td>\\d+</td>", text)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [CURVES, REPORT]
    (source,) = [value for name, value in page.attributes if name in ("src", "href")]
    header, _, data = source.partition(",")
    assert header == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / CURVES).read_bytes()
    assert "http" not in text.replace(data, "")
    assert len(text) < 300_000


def test_report_names_what_was_skipped_and_escapes_it(tmp_path: Path) -> None:
    names = ["<b>&.png", *[f"{index}.png" for index in range(300)]]
    history = rows(2, skipped_steps=4, unreadable=301)
    metrics = metrics_of(history, skipped_steps=4, unreadable=301)
    text, page = report(tmp_path, history, metrics=metrics, unreadable=names, title="<script>alert(1)</script>")
    assert "4 steps were skipped, 301 pictures could not be read." in page.text
    assert "<b>&.png" in page.text
    assert "&lt;b&gt;&amp;.png" in text
    assert "and 101 more" in page.text
    assert "<script" not in text
    page = report(tmp_path, history, metrics=metrics)[1]  # names may be unknown, as after a resume
    assert "301 pictures could not be read." in page.text


@pytest.mark.parametrize(
    "history",
    [rows(1), rows(300), rows(5, train_loss=math.nan, val_loss=math.inf), rows(3, top1=0.0, top5=0.0, lr=0.0)],
    ids=["one epoch", "300 epochs", "no numbers", "zeros"],
)
def test_curves_and_report_of_any_length(history: list[dict[str, float]], tmp_path: Path) -> None:
    _, page = report(tmp_path, history)
    assert f"of {len(history)}" in page.text
    with Image.open(tmp_path / CURVES) as picture:
        assert picture.width > 1000
        assert len(set(picture.convert("L").resize((100, 40)).tobytes())) > 3  # something is drawn
