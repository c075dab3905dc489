"""Pictures read for what they mean: upright, of 8 bits, in the channels that a model takes.

The one reader of training, evaluation, checks and predictions of classifiers. The pipelines of OpenMMLab keep OpenCV's
pixels and take from here which way a picture stands.
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .errors import InputError

IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
PICTURE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> what PIL calls such a picture
ORIENTATION = 0x0112  # the tag of EXIF
# its values -> what brings the picture upright; 1 is upright (EXIF 2.32, Sec. 4.6.4)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ON_ITS_SIDE = (5, 6, 7, 8)
MOST_PIXELS = 2**30  # OpenCV's limit; Pillow's own refuses what telephones take, of 200 million
PHOTOMETRIC, WHITE_IS_ZERO = 0x0106, 0  # a tag of TIFF, and its value in which Pillow leaves 16 bits negative
WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types, of which a picture's orientation may be
# (module, beginning) of warnings about pictures whose pixels are right all the same: what is not is an error. None of
# them names the picture, and each worker repeats them
FALSE_ALARMS = (
    (r"PIL\.TiffImagePlugin", ""),  # malformed metadata, EXIF's of a JPEG too: the orientation alone is of use
    (r"PIL\.Image", "Palette images with Transparency"),  # which is dropped, as of every picture
    (r"PIL\.Image", r"Image size \(\d+ pixels\) exceeds limit"),  # half of `MOST_PIXELS`
    (r"PIL\.JpegImagePlugin", "Image appears to be a malformed MPO file"),  # read as the JPEG that it is
)
Item = TypeVar("Item")
Content = TypeVar("Content")


def silence_false_alarms() -> None:
    """Ignore the warnings of `FALSE_ALARMS` in this process."""
    for module, beginning in FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=beginning, module=module)


def open_picture(file: str | Path | IO[bytes]) -> Image.Image:
    """Pillow's `open`, whatever was set for the whole process."""
    # libraries switch this on; half of a picture would then pass for one, its rest grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # twice as many are an error
    return Image.open(file)


def orientation(picture: Image.Image) -> int:
    """EXIF's orientation of an opened picture, 1 to 8; 1 where there is none.

    The one tag is read by itself, so that it does not matter what is wrong with the others.
    """
    tags = getattr(picture, "tag_v2", None)  # of a TIFF, whose directory EXIF's is
    if tags is not None:
        value = tags.get(ORIENTATION)
    else:
        value = _orientation_in(picture.info.get("exif") or _exif_behind_pixels(picture))
    return value if isinstance(value, int) and value in TURNS else 1


def _orientation_in(exif: bytes) -> int | None:
    exif = exif.removeprefix(b"Exif\x00\x00")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", exif, entry)
        if tag == ORIENTATION and kind in WHOLE_NUMBERS:
            return struct.unpack_from(order + WHOLE_NUMBERS[kind], exif, entry + 8)[0]
    return None


def _exif_behind_pixels(picture: Image.Image) -> bytes:
    """Of a PNG, as ImageMagick writes them: Pillow reads these with the pixels."""
    file = getattr(picture, "fp", None)
    if picture.format != "PNG" or file is None:
        return b""
    position = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            (length,), kind = struct.unpack(">I", header[:4]), header[4:]
            if kind == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)  # the last four are its checksum
    finally:
        file.seek(position)
    return b""


def decode(
    file: str | Path | IO[bytes], channels: int = 3, *, part: Callable[[Image.Image], int] | None = None
) -> Image.Image:
    """The first frame of a picture, upright, of 8 bits, with 1 (grey), 3 (RGB) or 4 (RGBA) channels.

    Grey of 16 bits is scaled, transparency is dropped where there is no channel for it.

    Args:
        part: is shown a picture that can be decoded at a part of its size, a JPEG that needs nothing else, before its
            pixels are; it may say 2, 4 or 8, which decodes a half, a quarter or an eighth of each side, rounded up, and
            as large a part of each pixel's frequencies (scaled DCT), or 1. Other pictures are decoded whole.

    Raises:
        ValueError: numbers whose black and white nobody knows (floating-point, or beyond 16 bits), or no bytes at all.
        OSError, SyntaxError, ...: what Pillow raises at a file that is no picture.
    """
    if isinstance(file, str | Path):
        with open(file, "rb") as opened:  # by name, Pillow 13 gives rows of other lengths of a TIFF on its side
            return decode(opened, channels, part=part)
    if not file.read(1):
        raise ValueError("it is empty (0 bytes)")
    file.seek(0)
    mode = PICTURE_MODES[channels]
    with open_picture(file) as picture:
        if part is not None and (picture.format, picture.mode, orientation(picture)) == ("JPEG", mode, 1):
            wanted, (width, height) = part(picture), picture.size
            picture.draft(mode, (max(width // wanted, 1), max(height // wanted, 1)))
        picture.load()  # some formats have their EXIF behind the pixels
        # a TIFF is turned by its `load`, which takes the tag away in later versions of Pillow only
        turn = None if picture.format == "TIFF" else TURNS.get(orientation(picture))
        upright = _eight_bits(picture if turn is None else picture.transpose(turn))
        if picture.mode.startswith("I;16") and getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
            upright = ImageOps.invert(upright)
        return upright if upright.mode == mode else upright.convert(mode)  # to the same would copy it


def _eight_bits(picture: Image.Image) -> Image.Image:
    """In a mode from which each of `PICTURE_MODES` can be had, without a warning."""
    mode = picture.mode
    if mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers, of which nothing says what is white: save it with 8 or 16 bits"
        )
    if mode == "I" or mode.startswith("I;16"):
        grey = np.asarray(picture)
        if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) < 2**16:
            raise ValueError(
                f"its pixels are from {grey.min()} to {grey.max()}, more than 16 bits hold: save it with 8 or 16 bits"
            )
        return Image.fromarray((grey // 257).astype(np.uint8))
    if mode == "LAB":
        return picture.convert("RGB")
    if mode in ("PA", "RGBa") or (mode == "P" and isinstance(picture.info.get("transparency"), bytes)):
        return picture.convert("RGBA")
    return picture.convert("LA") if mode == "La" else picture


def check_channels(channels: int) -> None:
    """
    Raises:
        InputError: pictures do not have as many.
    """
    if channels not in PICTURE_MODES:
        raise InputError(f"the model takes {channels} channels, pictures have 1, 3 or 4: feed it tensors from Python")


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """`decode` of a file, with a line that names it.

    Raises:
        InputError: a file that is empty or no picture, or a number of channels that pictures do not have.
    """
    check_channels(channels)
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        raise InputError(f"picture {path} is empty (zero bytes): copy or download it again")
    try:
        return decode(path, channels)
    except MemoryError:
        raise
    except Exception as error:  # what decoders raise at damaged bytes is beyond listing
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"picture {path} cannot be read ({reason}): replace it or leave it out") from error


def find_images(
    paths: Iterable[str | Path],
    what: str = "picture",
    kind: str = "pictures",
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
) -> list[Path]:
    """The pictures, or other files, that `paths` name; a folder stands for all in it and below, sorted by path.

    Raises:
        InputError: a path that does not exist, or a folder without pictures.
    """
    images = []
    for given in paths:
        if not str(given):
            raise InputError(f"a {what}'s path is empty: name a {what} or a folder")
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and not file.is_dir())
            if not found:
                raise InputError(f"{path} holds no {kind} ({', '.join(suffixes)}): give a folder that does")
            images += found
        elif path.exists():
            images.append(path)
        else:
            raise InputError(f"{what} {path} does not exist: check the path")
    return images


def bearable(share: float, count: int) -> int:
    """How many of `count` files may be unreadable: a small set may lose one all the same, unless the share is 0."""
    return max(int(share * count + 1e-9), math.ceil(share))  # 0.29 * 100 is a little less than 29


class Reading(Generic[Item]):
    """Files that `predict` reads one by one; those that cannot be read are passed over, and named at the end.

    Args:
        on_error: "skip", or "fail" to stop at the first.

    Attributes:
        done: what was read, in order.
        failed: a line for each of the others.
    """

    def __init__(self, on_error: str = "skip") -> None:
        self.on_error = on_error
        self.done: list[Item] = []
        self.failed: list[str] = []

    @staticmethod
    def add_argument(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--on-error",
            choices=("skip", "fail"),
            default="skip",
            help="a file that cannot be read is left out and named at the end, or ends the command (default skip)",
        )

    def read(self, reader: Callable[[Item], Content], item: Item) -> Content | None:
        """`reader(item)`, or None where that raises an `InputError` that is to be passed over."""
        try:
            content = reader(item)
        except InputError as error:
            if self.on_error == "fail":
                raise
            self.failed.append(" ".join(str(error).split()))
            return None
        self.done.append(item)
        return content

    def status(self) -> int:
        """Names the files that were left out; the exit status, 1 if there are any."""
        for line in self.failed:
            print(f"error: {line}", file=sys.stderr)
        if self.failed and len(self.failed) + len(self.done) > 1:
            print(f"{len(self.failed)} of {len(self.failed) + len(self.done)} files were left out", file=sys.stderr)
        return 1 if self.failed else 0
