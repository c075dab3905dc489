"""Videos opened and decoded by decord, or by PyAV where decord does not import (it has wheels for x86-64 alone).

Both count the packets of the first video stream, decode them in order and convert to RGB by the same library, so that
frame i of one is frame i of the other. They differ where a video was cut out of another without encoding it again: what
was kept before its beginning, for the frames after it to be decoded, counts for decord, which shows the nearest frame
for each, and not for PyAV.
"""

from __future__ import annotations

import importlib
import io
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hvt_backbones.errors import InputError

DECODERS = ("auto", "decord", "pyav")
VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
CHUNK = 32  # frames in memory at a time
LONGEST = 160  # characters of a decoder's message
DECORD_PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")  # the time, and the line in its source


class ClipError(Exception):
    """What is wrong with a clip, without its name."""


class Decoder(NamedTuple):
    """
    Attributes:
        name: "decord" or "pyav".
        reason: why this one, in words.
    """

    name: str
    reason: str


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
        return Decoder(name, "asked for")
    try:
        importlib.import_module("decord")
    except Exception as error:  # a library that does not fit fails with more than ImportError
        reason = f"decord does not import ({' '.join(str(error).split()) or type(error).__name__})"
    else:
        return Decoder("decord", "it imports")
    try:
        importlib.import_module("av")
    except Exception as error:
        raise InputError(f"{reason}, nor does PyAV ({error}): `make install-all` installs one of them") from error
    return Decoder("pyav", reason)


def count_packets(content: bytes) -> int:
    """Packets of the first video stream that are shown, which are its frames; the header may state none, or others."""
    import av

    with av.open(io.BytesIO(content)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size and not packet.is_discard)


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


def explain(content: bytes, error: BaseException) -> ClipError:
    """Why a file that a decoder refused with `error` is no clip; PyAV, if it is there, tells what it holds."""
    try:
        import av

        with av.open(io.BytesIO(content)) as container:
            if not container.streams.video:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                return ClipError(f"has no video stream (it holds {kinds})")
    except Exception:
        pass  # no container that it knows
    text = getattr(error, "strerror", None) or DECORD_PLACE.sub("", str(error))
    return ClipError(f"cannot be decoded ({' '.join(text.split())[:LONGEST] or type(error).__name__})")


def probe(path: str | Path, decoder: str, *, quick: bool = False) -> int:
    """Decode a clip by "decord" or "pyav", with `quick` only its first frame, and return its number of frames.

    Raises:
        ClipError: what is wrong with it.
    """
    content = read_bytes(path)
    try:
        count, decoded = (_probe_decord if decoder == "decord" else _probe_pyav)(content, quick)
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own
        raise explain(content, error) from error
    if decoded < (1 if quick else count):
        raise ClipError(f"cannot be decoded: frame {decoded} of {count} is damaged")
    return count


def _probe_decord(content: bytes, quick: bool) -> tuple[int, int]:
    import decord

    reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
    count = len(reader)
    end = 1 if quick else count
    for start in range(0, end, CHUNK):
        reader.get_batch(range(start, min(start + CHUNK, end)))
    return count, end


def _probe_pyav(content: bytes, quick: bool) -> tuple[int, int]:
    import av

    count, decoded = count_packets(content), 0
    with av.open(io.BytesIO(content)) as container:
        for _ in container.decode(video=0):
            decoded += 1
            if quick:
                break
    return count, decoded


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
