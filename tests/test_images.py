"""Pictures are read for what they mean, whatever their mode, orientation and metadata."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvt_backbones import InputError
from hvt_backbones.images import TURNS, decode, find_images, orientation, read_image

RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (8, 1))
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREYS = {
    "8 bits": (Image.fromarray(RAMP), "png"),
    "16 bits": (Image.fromarray(RAMP.astype(np.uint16) * 257), "png"),
    "16 bits of a TIFF": (Image.fromarray(RAMP.astype(np.uint16) * 257), "tiff"),
    "16 bits, the other end first": (Image.fromarray((RAMP.astype(np.uint16) * 257).astype(">u2")), "tiff"),
    "16 of 32 bits": (Image.fromarray(RAMP.astype(np.int32) * 257), "tiff"),
    "with alpha": (Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(255 - RAMP))), "png"),
    "in colours": (Image.fromarray(RAMP).convert("RGB"), "png"),
}


def written(tmp_path: Path, picture: Image.Image, kind: str, **options) -> Path:
    picture.save(tmp_path / f"x.{kind}", **options)
    return tmp_path / f"x.{kind}"


@pytest.mark.parametrize("kind", GREYS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_of_any_depth(kind: str, channels: int, tmp_path: Path) -> None:
    pixels = np.array(read_image(written(tmp_path, *GREYS[kind]), channels))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels if channels == 1 else pixels[..., 0], RAMP)


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        (RAMP.astype(np.float32) / 255, "floating-point"),
        (RAMP.astype(np.int32) * 2**17, "more than 16 bits"),
        (RAMP.astype(np.int32) - 1, "-1 to"),
    ],
)
def test_numbers_whose_white_nobody_knows_are_refused(numbers: np.ndarray, reason: str, tmp_path: Path) -> None:
    path = written(tmp_path, Image.fromarray(numbers), "tiff")
    with pytest.raises(InputError, match=rf"{path}.*{reason}"):
        read_image(path)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "CMYK", "transparent palette"])
def test_other_modes_are_colours_without_a_warning(mode: str, tmp_path: Path) -> None:
    picture, options = Image.fromarray(COLOURS), {}
    if mode == "transparent palette":
        picture, options = picture.quantize(16), {"transparency": bytes(range(16))}
    else:
        picture = picture.convert(mode)
    path = written(tmp_path, picture, "tiff" if mode == "CMYK" else "png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.array(decode(path))
    assert np.array_equal(found, np.array(picture.convert("RGB")))


def test_the_first_picture_of_several(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "tiff"):
        options = {"lossless": True} if kind == "webp" else {}
        path = written(tmp_path, frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.array(read_image(path))[0, 0].tolist() in ([255, 0, 0], [254, 0, 0])


@pytest.mark.parametrize("turn", [1, *TURNS])
@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpeg"])
def test_pictures_stand_upright(turn: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = written(
        tmp_path, Image.fromarray(COLOURS), kind, exif=exif, **({"lossless": True} if kind == "webp" else {})
    )
    stored = Image.fromarray(COLOURS)
    if kind == "jpeg":  # loses a little
        with Image.open(path) as picture:
            stored = picture.convert("RGB")
    expected = stored if turn == 1 else stored.transpose(TURNS[turn])
    assert np.array_equal(np.array(read_image(path)), np.array(expected))


@pytest.mark.parametrize("turn", [3, 6, 8])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_stands_upright_in_any_mode(turn: int, mode: str, tmp_path: Path) -> None:
    grey = Image.fromarray(COLOURS).convert("L")
    picture = Image.fromarray(np.asarray(grey, np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    path = written(tmp_path, picture, "tiff", tiffinfo={0x0112: turn})
    assert np.array_equal(np.array(read_image(path, 1)), np.array(grey.transpose(TURNS[turn])))


def test_the_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = written(tmp_path, Image.fromarray(COLOURS), "png", exif=exif).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    last = content.index(b"IEND") - 4
    (tmp_path / "behind.png").write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    with Image.open(tmp_path / "behind.png") as picture:
        assert orientation(picture) == 6
        assert np.array_equal(np.array(picture), COLOURS)
    assert read_image(tmp_path / "behind.png").size == (12, 20)


def test_a_negative_of_16_bits(tmp_path: Path) -> None:
    negative = Image.fromarray((255 - RAMP).astype(np.uint16) * 257)
    path = written(tmp_path, negative, "tiff", tiffinfo={0x0106: 0})
    assert np.array_equal(np.array(read_image(path, 1)), RAMP)


def test_a_telephone_takes_more_pixels_than_pillow_opens_by_itself(tmp_path: Path) -> None:
    assert read_image(written(tmp_path, Image.new("1", (16320, 12240)), "png"), 1).size == (16320, 12240)


def test_a_folder_stands_for_its_pictures_and_for_links_that_lead_nowhere(tmp_path: Path) -> None:
    for name in ("a.JFIF", "b.avif", "c.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").symlink_to(tmp_path / "gone.png")
    assert [path.name for path in find_images([tmp_path])] == ["a.JFIF", "b.avif", "d.png"]


def exif_block(order: str, tags: list[bytes], count: int | None = None) -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    number = len(tags) if count is None else count
    return (
        b"Exif\0\0" + head + struct.pack(order + "I", 8) + struct.pack(order + "H", number) + b"".join(tags) + b"\0" * 4
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_malformed_tag_beside_the_orientation_means_nothing(order: str) -> None:
    turned = struct.pack(order + "HHIHH", 0x112, 3, 1, 6, 0)
    as_text = struct.pack(order + "HHI4s", 0x11A, 2, 3, b"72\0\0")
    far_away = struct.pack(order + "HHII", 0x010F, 2, 200, 5000)
    for tags, count, expected in (
        ([turned, as_text], None, 6),
        ([far_away, turned], None, 6),
        ([turned], 9, 6),
        ([far_away], 9, 1),
        ([struct.pack(order + "HHIHH", 0x112, 3, 1, 77, 0)], None, 1),
        ([struct.pack(order + "HHII", 0x112, 4, 1, 6)], None, 6),
    ):
        file = io.BytesIO()
        Image.fromarray(COLOURS).save(file, "JPEG", exif=exif_block(order, tags, count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, as it opens the file
            with Image.open(file) as picture:
                assert orientation(picture) == expected
            file.seek(0)
            assert decode(file).size == ((12, 20) if expected == 6 else (20, 12))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\0\0", b"Exif\0\0garbage", b"Exif\0\0MM"])
def test_exif_that_is_none(exif: bytes, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(written(tmp_path, Image.fromarray(COLOURS), "jpeg", exif=exif)).size == (20, 12)
