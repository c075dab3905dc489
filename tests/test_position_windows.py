"""A SwinV2 in another window divides offsets by the window that its weights were trained with, however they tell it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hvt_backbones import (
    Classifier,
    SwinTransformerV2,
    WeightsError,
    convert_state_dict,
    create_classifier,
    load_weights,
)
from hvt_backbones.cli import main
from hvt_backbones.model_file import open_model
from hvt_backbones.variants import VARIANTS
from hvt_backbones.weights import load
from hvt_backbones.weights.files import read_weights, save_state_dict
from hvt_backbones.weights.position_windows import windows_of_training

TINY = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}


def tiny(window: int | tuple[int, int] = 4, **more) -> Classifier:
    model = create_classifier("swinv2_tiny_window8", num_classes=3, window_size=window, **TINY, **more)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def save(model: Classifier, path: Path, size: int = 32, **overrides: object) -> Path:
    """As the trainer does."""
    facts = {"overrides": json.dumps({**TINY, **overrides}), "input_size": json.dumps([3, size, size])}
    metadata = {f"hvt.{name}": text for name, text in {"model": "swinv2_tiny_window8", **facts}.items()}
    return save_state_dict(model.state_dict(), path, metadata)


def biases(model: Classifier, window: int, corner: int) -> list[Tensor]:
    """Of the tokens of the upper left corner of a window, in each stage."""
    tokens = [row * window + column for row in range(corner) for column in range(corner)]
    attentions = [stage.blocks[0].attn for stage in model.backbone.stages]
    return [attn.position_bias((window, window), torch.device("cpu"))[:, tokens][:, :, tokens] for attn in attentions]


def windows(side: int) -> tuple[tuple[int, int], ...]:
    return ((side, side),) * 2


SOURCES: dict[str, Callable[[Classifier, Path], object]] = {
    "the trainer's file": lambda model, folder: save(model, folder / "small.safetensors", window_size=4),
    "its .pth": lambda model, folder: save(model, folder / "small.pth", window_size=4),
    **{
        f"coordinates of the {layout} code": lambda model, _, layout=layout: convert_state_dict(
            model.state_dict(), to=layout, window_size=4
        )
        for layout in ("official", "torchvision", "mmpretrain")
    },
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_each_offset_keeps_its_bias_in_a_larger_window(
    source: Callable[[Classifier, Path], object], tmp_path: Path
) -> None:
    small, large = tiny(4), tiny(8)
    report = load_weights(large, source(small, tmp_path))
    assert large.backbone.pretrained_window_size == windows(4)
    assert "pretrained_window_size of the model: 4" in str(report)
    for ours, theirs in zip(biases(large, 8, 4), biases(small, 4, 4), strict=True):
        torch.testing.assert_close(ours, theirs)
    same = tiny(4)
    assert load_weights(same, source(small, tmp_path)).pretrained_window_size is None
    assert same.backbone.pretrained_window_size == windows(0)


def test_official_coordinates_tell_an_earlier_window() -> None:
    model = tiny(6, pretrained_window_size=3)
    official = convert_state_dict(model.state_dict(), to="official", window_size=6, pretrained_window_size=3)
    for window in (6, 8):  # in its own too: without it the biases would be others
        other = tiny(window)
        load_weights(other, official)
        assert other.backbone.pretrained_window_size == windows(3)
        for ours, theirs in zip(biases(other, window, 6), biases(model, 6, 6), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_convert_records_the_window_that_coordinates_tell(tmp_path: Path) -> None:
    official = convert_state_dict(tiny(6).state_dict(), to="official", window_size=6, pretrained_window_size=3)
    overrides = {**TINY, "window_size": 6}
    metadata = {"hvt.overrides": json.dumps(overrides)}
    given = save_state_dict(official, tmp_path / "official.safetensors", metadata)
    written = tmp_path / "ours.safetensors"
    assert main(["convert", str(given), str(written), "--to", "hvt", "--model", "swinv2_tiny_window8"]) == 0
    recorded = json.loads(read_weights(written).metadata["hvt.overrides"])
    assert recorded == {**overrides, "pretrained_window_size": [[3, 3], [3, 3]]}
    assert open_model(str(written)).classifier().backbone.pretrained_window_size == windows(3)


def test_coordinates_of_windows_that_are_not_square_or_one_token() -> None:
    official = convert_state_dict(tiny((3, 5)).state_dict(), to="official", window_size=[(3, 5), (1, 1)])
    key = "layers.1.blocks.0.attn.relative_coords_table"
    for table in (official[key], torch.full_like(official[key], torch.nan)):  # the official code has 0 / 0
        model = tiny(8)
        load_weights(model, {**official, key: table})
        assert model.backbone.pretrained_window_size == ((3, 5), (1, 1))


def test_coordinates_that_are_none_tell_nothing() -> None:
    official = convert_state_dict(tiny(4).state_dict(), to="official", window_size=4)
    key = "layers.1.blocks.0.attn.relative_coords_table"
    for value in (0.0, torch.nan, torch.inf):
        model = tiny(8)
        load_weights(model, {**official, key: torch.full_like(official[key], value)})
        assert model.backbone.pretrained_window_size == windows(0)


def test_another_pretrained_window_size_is_refused(tmp_path: Path) -> None:
    file = save(tiny(4), tmp_path / "small.safetensors", window_size=4)
    model = tiny(8, pretrained_window_size=6)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        WeightsError, match=r"pretrained_window_size 6 in stage 0.* with 4: .*pretrained_window_size=4$"
    ):
        load_weights(model, file)
    assert model.backbone.pretrained_window_size == windows(6)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    load_weights(tiny(8, pretrained_window_size=4), file)


def test_weights_that_tell_no_window_leave_the_argument() -> None:
    state_dict = tiny(4).state_dict()
    for given in (0, 6):
        model = tiny(8, pretrained_window_size=given)
        assert load_weights(model, state_dict).pretrained_window_size is None
        assert model.backbone.pretrained_window_size == windows(given)


def test_published_weights_have_the_window_of_their_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "published.pth"
    torch.save(tiny(8).state_dict(), file)
    monkeypatch.setattr(load, "pretrained_file", lambda *_: file)
    for pretrained, expected in ((True, 8), ("in1k", 8), (str(file), 0)):
        model = create_classifier("swinv2_tiny_window8", num_classes=3, window_size=12, pretrained=pretrained, **TINY)
        assert model.backbone.pretrained_window_size == windows(expected), pretrained


def test_a_window_larger_than_the_map_was_the_map() -> None:
    arch = {"depths": (2, 2, 6, 2), "window_size": 16}
    assert windows_of_training(arch, (256, 256)) == [(16, 16), (16, 16), (16, 16), (8, 8)]
    assert windows_of_training({**arch, "small_map": "pad"}, (256, 256)) == [(16, 16)] * 4
    fine_tuned = VARIANTS["swinv2_base_window12to24_384"]
    assert windows_of_training(fine_tuned.arch, (384, 384)) == [(12, 12), (12, 12), (12, 12), (6, 6)]
    before = VARIANTS["swinv2_base_window12_192"]
    assert windows_of_training(before.arch, (192, 192)) == windows_of_training(fine_tuned.arch, (384, 384))


def test_the_window_is_shown() -> None:
    model = SwinTransformerV2(**{**TINY, "out_indices": (1,)}, window_size=8, pretrained_window_size=4)
    assert "pretrained_window_size=(4, 4)" in repr(model)
