"""Maps as people have them: each oddity is said by check, and refused, told or mended before and while it trains."""

from __future__ import annotations

import json
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from hvt_backbones.errors import InputError
from runner import annotation_guard, data, patches
from segmentation.check import main
from tests.dense_runs import draw_ade, write_config
from tests.segmentation.conftest import settings

TRAINING, VALIDATION = ("training",), ("validation",)
Change = Callable[[np.ndarray], Image.Image]


def grey(numbers: np.ndarray, alpha: int | None = None) -> Image.Image:
    channels = [numbers] * 3 + ([] if alpha is None else [np.full_like(numbers, alpha)])
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def palette(numbers: np.ndarray) -> Image.Image:
    image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    image.putpalette([7, 7, 7, 200, 0, 0] * 128)
    return image


def as_type(kind: type, *changes: tuple[int, int]) -> Change:
    """The map with other numbers: (old, new), ..."""

    def change(numbers: np.ndarray) -> Image.Image:
        numbers = numbers.astype(np.int64)
        new = numbers.copy()
        for old, other in changes:
            new[numbers == old] = other
        return Image.fromarray(new.astype(kind))

    return change


class RGB16:
    """A PNG of a kind that Pillow does not write: 16 bits in three channels."""

    bits, kind = 16, 2

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def rows(self) -> np.ndarray:
        return np.repeat(self.numbers.astype(">u2"), 3, axis=1).view(np.uint8)

    def save(self, path: Path) -> None:
        def chunk(name: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        height, width = self.numbers.shape
        head = struct.pack(">IIBBBBB", width, height, self.bits, self.kind, 0, 0, 0)
        pixels = b"".join(b"\0" + row.tobytes() for row in self.rows())
        chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


class FourBits(RGB16):
    """Grey of 16 steps, which all readers stretch to 255."""

    bits, kind = 4, 0

    def rows(self) -> np.ndarray:
        return self.numbers[:, ::2] << 4 | self.numbers[:, 1::2]


def sized(width: int, height: int) -> Change:
    return lambda numbers: Image.fromarray(numbers).resize((width, height), Image.Resampling.NEAREST)


def binary(cfg: dict[str, Any]) -> None:
    """Two classes, numbered from 0."""
    for part in ("train", "val", "test"):
        data = cfg[f"{part}_dataloader"]["dataset"]
        data.update(reduce_zero_label=False, metainfo={"classes": ("ground", "thing"), "palette": [[0] * 3, [9] * 3]})
        data["pipeline"] = [{**step} for step in data["pipeline"]]
        for step in data["pipeline"]:
            step.pop("reduce_zero_label", None)


def write(folder: Path, change: Change, parts: tuple[str, ...] = TRAINING + VALIDATION) -> dict[str, Any]:
    """The tiny data set with other maps; its configuration."""
    draw_ade(folder / "ade", {"training": 3, "validation": 2})
    for part in parts:
        for path in (folder / "ade/annotations" / part).glob("*.png"):
            change(np.array(Image.open(path))).save(path)
    return settings(str(folder / "ade"))


def load(cfg: dict[str, Any], part: str) -> list[np.ndarray]:
    """The maps of a data set as its pipeline reads them."""
    patches.apply("mmseg")
    init_default_scope("mmseg")
    dataset = DATASETS.build(cfg[f"{part}_dataloader"]["dataset"])
    return [dataset[index]["data_samples"].gt_sem_seg.data[0].numpy() for index in range(len(dataset))]


WRONG = {
    "colours": (
        lambda m: Image.fromarray(np.stack([m, m * 0, m], -1)), VALIDATION, "has 3 channels that differ: write one",
    ),
    "alpha": (lambda m: Image.fromarray(np.stack([m, m], -1)), TRAINING, "has 2 channels with an alpha that differs"),
    "beyond": (as_type(np.uint8, (3, 9)), TRAINING, "holds 9; the classes are 1 to 3"),
    "beyond in validation": (as_type(np.uint8, (3, 9)), VALIDATION, "holds 9; the classes are 1 to 3"),
    "16 bits": (as_type(np.uint16, (1, 257)), TRAINING, "holds 257; the classes are 1 to 3"),
    "16 bits of RGB": (RGB16, TRAINING, "has 3 channels of 16 bits: write one"),
    "another size": (sized(32, 32), VALIDATION, "is 32 x 32 pixels, its picture"),
    "another shape": (sized(64, 32), TRAINING, "is 32 x 64 pixels, its picture"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_map_is_said_and_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    change, parts, words = WRONG[case]
    cfg = write(tmp_path, change, parts)
    config = write_config(tmp_path / "tiny.py", cfg)
    assert main([str(config), "--workers", "0"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wrong: ")]
    assert said
    assert all(words in line and "ADE_0" in line for line in said)
    with pytest.raises(InputError, match=r"ADE_0\d+\.png ") as caught:
        load(cfg, "train" if parts == TRAINING else "val")
    assert words in str(caught.value)


@pytest.mark.parametrize("case", ["16 bits", "another size", "colours"])
def test_what_the_sample_missed_is_named_as_it_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, _, words = WRONG[case]
    cfg = write(tmp_path, lambda numbers: Image.fromarray(numbers))
    path = sorted((tmp_path / "ade/annotations/training").glob("*.png"))[1]
    change(np.array(Image.open(path))).save(path)
    monkeypatch.setattr(data, "evenly", lambda items, count: items[:1])
    with pytest.raises(InputError) as caught:
        load(cfg, "train")
    assert str(caught.value).startswith(f"{path} {words}")


# name -> change, settings, the labels of the numbers 1, 2, 3, and what is told before training
TOLD = {
    "grey written as RGB": (grey, None, {1: 0, 2: 1, 3: 2}, "has channels that are equal"),
    "grey with an opaque alpha": (lambda m: grey(m, 255), None, {1: 0, 2: 1, 3: 2}, "has channels that are equal"),
    "nothing but ignored": (
        as_type(np.uint8, (1, 0), (2, 0), (3, 255)), None, {1: 255, 2: 255, 3: 255}, "nothing but ignored",
    ),
    "0 and 255 for two classes": (
        as_type(np.uint8, (1, 0), (2, 255), (3, 255)), binary, {1: 0, 2: 255, 3: 255},
        "in 3 maps the class ground occurs, and 255 in 3, never thing",
    ),
    "255, and a class that never occurs": (
        as_type(np.uint8, (1, 255)), None, {1: 255, 2: 1, 3: 2}, "1 of 3 classes never occur, ground",
    ),
    "two classes in one": (as_type(np.uint8, (3, 2)), None, {1: 0, 2: 1, 3: 1}, "1 of 3 classes never occur, box"),
}  # fmt: skip
SILENT = {
    "palette": (palette, None, {1: 0, 2: 1, 3: 2}),
    "16 bits": (as_type(np.uint16), None, {1: 0, 2: 1, 3: 2}),
    "4 bits": (FourBits, None, {1: 0, 2: 1, 3: 2}),
    "black and white": (lambda m: Image.fromarray(m > 1), binary, {1: 0, 2: 1, 3: 1}),
}


@pytest.mark.parametrize("case", [*TOLD, *SILENT])
def test_a_sound_map_is_read_for_what_it_means(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, adapt, labels, *words = {**TOLD, **SILENT}[case]
    drawn = write(tmp_path / "drawn", lambda numbers: Image.fromarray(numbers))["train_dataloader"]["dataset"][
        "data_root"
    ]
    cfg = write(tmp_path, change)
    if adapt:
        adapt(cfg)
    told: list[str] = []
    monkeypatch.setattr(
        annotation_guard,
        "print_log",
        lambda line, logger, level: told.append(line) if level == logging.WARNING else None,
    )
    found = load(cfg, "train")
    originals = [np.array(Image.open(path)) for path in sorted((Path(drawn) / "annotations/training").glob("*.png"))]
    for numbers, read in zip(originals, found, strict=True):
        np.testing.assert_array_equal(read, np.vectorize(labels.get)(numbers))
    assert len(told) == len(words)
    assert all(word in told[0] for word in words)
    assert main([str(write_config(tmp_path / "tiny.py", cfg)), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in words)


def test_check_reads_all_and_walks_through_wrappers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = write(tmp_path, lambda numbers: Image.fromarray(numbers))
    loader = cfg["train_dataloader"]
    wrapped = {
        "type": "RepeatDataset",
        "times": 2,
        "dataset": {"type": "ConcatDataset", "datasets": [loader["dataset"]]},
    }
    cfg["train_dataloader"] = {**loader, "dataset": wrapped}
    picture = sorted((tmp_path / "ade/images/training").glob("*.jpg"))[-1]
    picture.write_bytes(picture.read_bytes()[:-200])
    turned = sorted((tmp_path / "ade/images/validation").glob("*.jpg"))[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(turned).resize((64, 48)).save(turned, exif=exif)
    maps = sorted((tmp_path / "ade/annotations/validation").glob("*.png"))
    for size in ((64, 48), (48, 64)):  # as the picture is stored, and upright
        Image.open(maps[0]).resize(size, Image.Resampling.NEAREST).save(maps[0])
        config = write_config(tmp_path / "tiny.py", cfg)
        assert main([str(config), "--workers", "0", "--json", str(tmp_path / "found.json")]) == 1
        found = json.loads((tmp_path / "found.json").read_text())
        assert [one["kind"] for one in found["train"][0]["findings"] if one["wrong"]] == ["picture that cannot be read"]
        assert not [one for one in found["val"][0]["findings"] if one["wrong"]]
    assert found["train"][0]["counts"] == {"ground": 3, "disc": 3, "box": 1}
    assert f"wrong: {picture} cannot be read" in capsys.readouterr().out
    assert main([str(config), "--workers", "0", "--quick"]) == 0  # its header is sound
