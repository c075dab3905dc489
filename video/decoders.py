"""Which decoder reads clips, whether a file is a clip, and why it is none; `video.readers` does the reading."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hvt_backbones.errors import InputError

from .readers import Clip, ClipError

DECODERS = ("auto", "decord", "pyav")
VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
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
        module = {"decord": "decord", "pyav": "av"}[name]
        try:
            importlib.import_module(module)
        except Exception as error:
            raise InputError(f"decoder is {name!r}, which does not import ({error}): choose auto") from error
        return Decoder(name, "asked for", name)
    try:
        importlib.import_module("decord")
    except Exception as error:  # a library that does not fit fails with more than ImportError
        reason = f"decord does not import ({' '.join(str(error).split()) or type(error).__name__})"
    else:
        reason = ""
    try:
        importlib.import_module("av")
    except Exception as error:
        if not reason:
            return Decoder("decord", "it imports", "decord")
        raise InputError(f"{reason}, nor does PyAV ({error}): `make install-all` installs one of them") from error
    if reason:
        return Decoder("pyav", reason, "pyav")
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


def find_videos(given: Sequence[str]) -> list[Path]:
    """The files that `given` names; a folder stands for all videos in it and below, sorted by path.

    Raises:
        InputError: a path that does not exist, or a folder without videos.
    """
    videos: list[Path] = []
    for name in given:
        path = Path(name)
        if not name:
            raise InputError("a clip's path is empty: name a file or a folder")
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file())
            if not found:
                raise InputError(f"{path} holds no videos ({', '.join(VIDEO_SUFFIXES)}): give a folder that does")
            videos += found
        elif os.path.exists(path):
            videos.append(path)
        else:
            raise InputError(f"clip {path} does not exist: check the path")
    return list(dict.fromkeys(videos))
