"""The frames of one clip, the same by decord and by PyAV: as they are shown, turned as the header says, in RGB.

Both count the packets of the best video stream that are shown and decode them in order. What differs between the two
is brought together here. decord 0.6, the last, is built on FFmpeg 4.1: it knows neither mirrored nor all turned videos,
and it counts what a video that was cut out of another without encoding it again keeps before its beginning.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The track header of an MP4 or MOV, version 0 or 1: what precedes the matrix, and the matrix with its constants.
TRACK_MATRIX = re.compile(rb"(tkhd(?:\x00.{39}|\x01.{51}))(?:.{8}\x00{4}){2}.{8}\x40\x00{3}", re.DOTALL)
UPRIGHT_MATRIX = bytes.fromhex("00010000 00000000 00000000 00000000 00010000 00000000 00000000 00000000 40000000")
# Containers in which decord finds a frame by its time; in others it shows other frames than were asked for.
FOUND_BY_TIME = ("mov", "matroska", "flv")


class ClipError(Exception):
    """What is wrong with a clip, without its name."""


class Turn(NamedTuple):
    """From a frame as it is stored to the one that is shown: rows become columns, then each axis may be reversed."""

    transposed: bool = False
    down: bool = False
    across: bool = False

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(N, H, W, 3), (N, W, H, 3) where it is transposed."""
        if self.transposed:
            frames = frames.swapaxes(1, 2)
        frames = frames[:, :: -1 if self.down else 1, :: -1 if self.across else 1]
        return np.ascontiguousarray(frames)


def find_turn(frame: Any) -> Turn:
    """Of PyAV's frame, by its display matrix; one that turns by other than right angles is left out, as by OpenCV."""
    if (data := frame.side_data.get("DISPLAYMATRIX")) is None:
        return Turn()
    (a, b), (c, d) = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].tolist()
    straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) * 50 < straight:  # about a degree, as FFmpeg has it
        return Turn(False, d < 0, a < 0)
    if max(abs(a), abs(d)) * 50 < across:
        return Turn(True, b < 0, c < 0)
    return Turn()


class Header(NamedTuple):
    """
    Attributes:
        count: packets that are shown, which are the frames; what a container states may be none, or another number.
        keys: which of them can be decoded without others.
        turn: of the first frame.
        rate: frames per second on average.
        container: FFmpeg's first name of its format.
        tagged: has a tag that FFmpeg took for a turn once.
        streams: of video, without pictures of a cover.
    """

    count: int
    keys: tuple[int, ...]
    turn: Turn
    rate: float
    container: str
    tagged: bool
    streams: int


def _shown(container: Any) -> Any:
    """Of several video streams the one that FFmpeg's programs take.

    Raises:
        ClipError: there is none.
    """
    stream = container.streams.best("video")
    if stream is None:
        raise ClipError("it has no video stream")
    return stream


def read_header(content: bytes) -> Header:
    """By PyAV."""
    import av

    packets: list[tuple[int, int, bool]] = []
    turn = None
    with av.open(io.BytesIO(content)) as container:
        stream = _shown(container)
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                pts = packet.pts if packet.pts is not None else len(packets)
                packets.append((pts, len(packets), packet.is_keyframe))
            if turn is None:
                with contextlib.suppress(av.FFmpegError):  # whoever wants this frame will see
                    turn = next((find_turn(frame) for frame in packet.decode()), None)
        covers = getattr(av.stream, "Disposition", None)  # PyAV 14 does not tell
        streams = sum(not (covers and one.disposition & covers.attached_pic) for one in container.streams.video)
        tagged = "rotate" in {name.lower() for name in stream.metadata}
        rate, name = float(stream.average_rate or 0), container.format.name.partition(",")[0]
    keys = tuple(index for index, packet in enumerate(sorted(packets)) if packet[2])
    return Header(len(packets), keys, turn or Turn(), rate, name, tagged, streams)


def import_problem(decoder: str) -> str | None:
    """Why "decord" or "pyav" does not import; None where it does."""
    try:
        importlib.import_module({"decord": "decord", "pyav": "av"}[decoder])
    except Exception as error:  # a library that does not fit fails with more than ImportError
        return " ".join(str(error).split()) or type(error).__name__
    return None


class InOrder:
    """Frames that are decoded one after another: on from where it has come to, or from the beginning.

    Its functions must not hold who holds it, or decoders and their threads wait for the garbage collector.
    """

    def __init__(self, decode: Callable[[], Iterator[Any]], to_array: Callable[[Any], NDArray[np.uint8]]) -> None:
        self.decode = decode
        self.to_array = to_array
        self.frames, self.position = decode(), 0

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        if min(indices) < self.position:
            self.frames, self.position = self.decode(), 0
        found: dict[int, Any] = dict.fromkeys(indices)
        last = max(indices)
        for frame in self.frames:
            if self.position in found:
                found[self.position] = self.to_array(frame)
            self.position += 1
            if self.position > last:
                return np.stack([found[index] for index in indices])
        raise ClipError(f"frame {self.position} is damaged")


class DecordReader:
    """A clip by decord, whose header PyAV reads where it imports."""

    def __init__(self, content: bytes, num_threads: int) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's messages name no file
        # decord would tell of no container on stderr
        self.header = None if import_problem("pyav") else read_header(content)
        self.turn = self.header.turn if self.header else Turn()
        if self.header and self.header.container == "mpegts":
            raise ClipError("it loses its place in a transport stream")  # for ever, now and then
        if self.header and self.header.streams > 1:
            raise ClipError(f"it takes another of {self.header.streams} video streams than other programs")
        if self.header and self.header.tagged:
            raise ClipError("it turns the clip by a tag, as players do not")
        if self.turn != Turn():
            content = TRACK_MATRIX.sub(rb"\g<1>" + UPRIGHT_MATRIX, content)  # decord fails at some widths that it turns
        # without fault_tol frames that it cannot decode are silently copies of others
        start = partial(decord.VideoReader, num_threads=num_threads, fault_tol=1e-6)
        self.reader = start(io.BytesIO(content))
        if self.header and self.header.count != len(self.reader):
            raise ClipError(f"it counts {len(self.reader)} frames, of which {self.header.count} are shown")
        self.rate = float(self.reader.get_avg_fps())
        self.in_order = None
        if self.header and self.header.container not in FOUND_BY_TIME:
            self.in_order = InOrder(partial(_decode_decord, start, content), lambda frame: frame.asnumpy())

    def __len__(self) -> int:
        return len(self.reader)

    def keys(self) -> Sequence[int]:
        return self.header.keys if self.header else self.reader.get_key_indices()  # decord has them as they are decoded

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return self.turn(self.in_order.read(indices) if self.in_order else self.reader.get_batch(indices).asnumpy())


def _decode_decord(start: Callable[[io.BytesIO], Any], content: bytes) -> Iterator[Any]:
    reader = start(io.BytesIO(content))
    for _ in range(len(reader)):
        yield reader.next()


class PyAVReader:
    """A clip by PyAV."""

    def __init__(self, content: bytes, num_threads: int) -> None:
        self.header = read_header(content)
        if not self.header.count:
            raise ClipError("it holds no frame")
        self.rate = self.header.rate
        self.in_order = InOrder(partial(_decode_pyav, content, num_threads), ToRGB())

    def __len__(self) -> int:
        return self.header.count

    def keys(self) -> Sequence[int]:
        return self.header.keys

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        return self.header.turn(self.in_order.read(indices))


def _decode_pyav(content: bytes, num_threads: int) -> Iterator[Any]:
    import av

    with av.open(io.BytesIO(content)) as container:
        stream = _shown(container)
        stream.codec_context.thread_count = num_threads
        yield from container.decode(stream)


class ToRGB:
    """PyAV's frames, as decord converts them; PyAV's own conversion is another in each of its releases.

    It matters where FFmpeg interpolates the colours of 4:2:0, with more than 8 bits. decord's FFmpeg takes one row of
    them or the mean of two: for an even row the last and its own, for the last row the last two, unless the width is
    odd. (In a video of odd height it is in between, which is left to differ.) Frames take the size of the first, should
    the video change it.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self.kind: tuple[int, int, str] | None = None

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """(H, W, 3)."""
        kind = frame.width, frame.height, frame.format.name
        if kind != self.kind:
            self.kind, self.size = kind, self.size or kind[:2]
            self._configure(frame)
        picture = _through(self.whole, frame)
        if self.end:
            picture = np.concatenate([picture[:-1], _through(self.end, frame)[3:4]])
        return picture

    def _configure(self, frame: Any) -> None:
        interpolated = frame.format.chroma_height(16) == 8 and (frame.format.components[0].bits > 8 or frame.height % 2)
        scale = f"{self.size[0]}:{self.size[1]}:flags=bilinear"
        self.whole = self._graph(frame, ("scale", scale + ":in_v_chr_pos=256" * bool(interpolated)))
        self.end = None
        even = frame.height % 2 == frame.width % 2 == 0
        if interpolated and even and frame.height >= 4 and self.size == self.kind[:2]:
            steps = ("crop", "iw:4:0:ih-4"), ("pad", "iw:8"), ("scale", "flags=bilinear:in_v_chr_pos=512")
            self.end = self._graph(frame, *steps)

    def _graph(self, frame: Any, *filters: tuple[str, str]) -> Any:
        from av.filter import Graph

        graph = Graph()
        with contextlib.suppress(AttributeError):  # of older PyAV
            graph.threads = 1
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
        )
        for name, arguments in (*filters, ("format", "pix_fmts=rgb24"), ("buffersink", None)):
            following = graph.add(name, arguments)
            last.link_to(following)
            last = following
        graph.configure()
        return graph


def _through(graph: Any, frame: Any) -> NDArray[np.uint8]:
    graph.push(frame)
    return graph.pull().to_ndarray()


READERS = {"decord": DecordReader, "pyav": PyAVReader}


class Clip:
    """The frames of a video that is in memory.

    Args:
        content: of its file.
        decoder: "decord", "pyav", or "auto" for decord, and PyAV where that fails.
        num_threads: of the decoder.

    Raises:
        Exception: whatever a decoder raises at a file that it cannot read; `read` does, too.
    """

    def __init__(self, content: bytes, decoder: str, num_threads: int = 1) -> None:
        self.content = content
        self.num_threads = num_threads
        self.left = list(READERS) if decoder == "auto" else [decoder]
        self._open()

    def _open(self) -> None:
        name = self.left.pop(0)
        try:
            self.reader = READERS[name](self.content, self.num_threads)
        except MemoryError:
            raise
        except Exception:
            if not self.left:
                raise
            self._open()

    def __len__(self) -> int:
        return len(self.reader)

    def get_avg_fps(self) -> float:
        """Frames per second; so named by decord, for mmaction2's `DecordInit`."""
        return self.reader.rate

    def read(self, indices: Sequence[int], *, keys: bool = False) -> NDArray[np.uint8]:
        """The frames of these indices, (N, H, W, 3); with `keys` the last key frame up to each."""
        while True:
            try:
                if keys:
                    there = self.reader.keys()
                    return self.reader.read([there[max(0, bisect.bisect(there, index) - 1)] for index in indices])
                return self.reader.read(indices)
            except MemoryError:
                raise
            except Exception:
                if not self.left:
                    raise
                self._open()
