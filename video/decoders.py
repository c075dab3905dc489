"""Which decoder reads clips, whether a file is a clip, and why it is none; `video.readers` does the reading."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from hvt_backbones.errors import InputError
from hvt_backbones.images import find_images

from .readers import READERS, Clip, ClipError, import_problem

DECODERS = ("auto", *READERS)
VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
find_videos = partial(find_images, what="clip", kind="videos", suffixes=VIDEO_SUFFIXES)
CHUNK = 32  # frames in memory at a time
LONGEST = 160  # characters of a decoder's message
DECORD_PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # the time, and the line in its source


class Decoder(NamedTuple):
    """
    Attributes:
        name: "decord" or "pyav".
        reason: why this one, in words.
        setting: what `Clip` takes: the name, or "auto" where decord leaves to PyAV what it cannot decode.
    """

    name: str
    reason: str
    setting: str


@cache
def find_decoder(name: str = "auto") -> Decoder:
    """The decoder of this name; "auto" is decord where it imports, else PyAV.

    Raises:
        InputError: an unknown name, or it does not import; with "auto", neither does.
    """
    if name not in DECODERS:
        raise InputError(f"decoder is {name!r}: choose one of {', '.join(DECODERS)}")
    if name != "auto":
        if problem := import_problem(name):
            raise InputError(f"decoder is {name!r}, which does not import ({problem}): choose auto")
        return Decoder(name, "asked for", name)
    decord, pyav = import_problem("decord"), import_problem("pyav")
    if decord and pyav:
        raise InputError(
            f"decord does not import ({decord}), nor does PyAV ({pyav}): `make install-all` installs one of them"
        )
    if decord:
        return Decoder("pyav", f"decord does not import ({decord})", "pyav")
    if pyav:
        return Decoder("decord", "it imports", "decord")
    return Decoder("decord", "it imports; what it cannot decode, by pyav", "auto")


def read_bytes(path: str | Path) -> bytes:
    """
    Raises:
        ClipError: it does not exist, cannot be read, or is empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ClipError("does not exist") from None
    except OSError as error:
        raise ClipError(f"cannot be opened ({error.strerror})") from error
    if not content:
        raise ClipError("is empty (0 bytes)")
    return content


def explain(content: bytes, error: BaseException, decoder: str) -> ClipError:
    """Why a file that `decoder` refused with `error` is no clip, or that the other decoder can read it."""
    try:
        import av

        with av.open(io.BytesIO(content)) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                return ClipError(f"has no video stream (it holds {kinds})")
    except Exception:
        pass  # no container that it knows
    text = getattr(error, "strerror", None) or DECORD_PLACE.sub("", str(error))
    text = " ".join(text.split())[:LONGEST] or type(error).__name__
    other = {"decord": "pyav", "pyav": "decord"}.get(decoder)  # "auto" has tried both
    if other:
        with contextlib.suppress(Exception):  # it does not import, or cannot either
            read_all(content, other)
            return ClipError(f'cannot be decoded by {decoder} ({text}), but decoder="{other}" can')
    return ClipError(f"cannot be decoded ({text})")


def read_all(content: bytes, decoder: str, *, quick: bool = False) -> int:
    """Decode all frames, with `quick` the first alone, and return their number."""
    clip = Clip(content, decoder)
    end = 1 if quick else len(clip)
    for start in range(0, end, CHUNK):
        clip.read(range(start, min(start + CHUNK, end)))
    return len(clip)


def probe(path: str | Path, decoder: str, *, quick: bool = False) -> int:
    """Decode a clip by "decord", "pyav" or "auto", with `quick` only its first frame; its number of frames.

    Raises:
        ClipError: what is wrong with it.
    """
    content = read_bytes(path)
    try:
        return read_all(content, decoder, quick=quick)
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own
        raise explain(content, error, decoder) from error
