"""The README says what is so: its table is current, its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import hvt_backbones as hvt
from hvt_backbones.cli import main
from hvt_backbones.weights import sources

from .conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_model_table_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--markdown"]) == 0
    table = re.search(r"<!-- models: [^\n]* -->\n(.*)<!-- /models -->", README, re.DOTALL)
    assert table is not None
    assert table[1] == capsys.readouterr().out, "put the output of `hvt models --markdown` between the markers"


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=["neck", "tune", "timm", "video", "simmim", "load", "large", "export"])
def test_the_examples_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With files of random weights in place of the downloads and of someone's detector."""

    def fetch(source: str | Path, **_: object) -> Path:
        if Path(source).exists():
            return Path(source)
        name = re.search(r"\w*(swin_tiny|pvt_v2_b0)\w*", str(source))[1]
        weights = hvt.convert_state_dict(hvt.create_classifier(name).state_dict(), to="timm")
        torch.save(weights, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"

    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.chdir(tmp_path)
    detector = hvt.convert_state_dict(hvt.create_backbone("swin_tiny").state_dict(), to="mmdet")
    detector = {f"backbone.{key}": tensor for key, tensor in detector.items()} | {"neck.fpn.weight": torch.zeros(3)}
    torch.save({"state_dict": detector, "meta": {}}, "mask_rcnn_swin_tiny.pth")
    torch.save(hvt.create_classifier("swin_tiny").state_dict(), "my_swin_tiny.pth")

    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    for shown in re.findall(r"print\(.*?\)  # (\(.*)", code):
        for shape in re.findall(r"\([\d, ]+\)", shown):
            assert shape in printed, f"the README promises {shape}"


def test_links_lead_to_files() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
