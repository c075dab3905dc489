"""What is odd in a data set, kind by kind; and what can be asked of each of its files, by several processes."""

from __future__ import annotations

import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from hvt_backbones.errors import InputError
from hvt_backbones.images import ON_ITS_SIDE, open_picture, orientation

CHUNK = 8  # items that a process takes at a time
SHOWN = 20  # of each kind; --json has all
LONGEST = 300  # characters of a foreign message


def describe(error: BaseException) -> str:
    """A foreign error in one line: its kind and what it says."""
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    kind = type(error).__name__
    return f"{kind}: {text[:LONGEST]}{'...' if len(text) > LONGEST else ''}" if text else kind


@dataclass(frozen=True)
class Kind:
    """
    Attributes:
        name: in a table: "box of no area".
        remedy: what the user does about it, or what is done here.
        wrong: it is refused; the rest is mended, left out or said.
    """

    name: str
    remedy: str
    wrong: bool = True


@dataclass
class Findings:
    """
    Attributes:
        source: the file or folder.
        found: for each kind what was found, as "annotation 5 has the category_id 99".
    """

    source: str
    found: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, what: str) -> None:
        self.found.setdefault(kind, []).append(what)

    @property
    def wrong(self) -> bool:
        return any(kind.wrong for kind in self.found)

    def refuse(self, command: str) -> None:
        """
        Raises:
            InputError: the first thing that is wrong, how many there are of its kind, and the command that lists them.
        """
        wrong = [(kind, found) for kind, found in self.found.items() if kind.wrong]
        if not wrong:
            return
        (kind, found), count = wrong[0], sum(len(found) for _, found in wrong)
        source = "" if found[0].startswith(self.source) else f"{self.source}: "
        more = f" (the first of {count} mistakes: `{command} CONFIG` lists them)" if count > 1 else ""
        raise InputError(f"{source}{found[0]}: {kind.remedy}{more}")

    def summary(self) -> str | None:
        """One line of what was found and is not refused."""
        notes = [
            f"{found[0]}{f' (the first of {len(found)})' if len(found) > 1 else ''}: {kind.remedy}"
            for kind, found in self.found.items()
            if not kind.wrong
        ]
        return f"{self.source}: {'; '.join(notes)}" if notes else None

    def lines(self) -> list[str]:
        """A count of each kind, and the first of each with what to do."""
        kinds = sorted(self.found, key=lambda kind: not kind.wrong)
        lines = [
            f"  {kind.name:<40}{len(self.found[kind]):>9}  {'wrong' if kind.wrong else ''}".rstrip() for kind in kinds
        ]
        for kind in kinds:
            shown = self.found[kind][: SHOWN if kind.wrong else 1]
            lines += [f"  {'wrong' if kind.wrong else 'note'}: {what}: {kind.remedy}" for what in shown]
            if kind.wrong and len(self.found[kind]) > SHOWN:
                lines.append(f"  and {len(self.found[kind]) - SHOWN} more; --json FILE has all")
        return lines

    def as_json(self) -> list[dict[str, Any]]:
        return [
            {"kind": kind.name, "wrong": kind.wrong, "remedy": kind.remedy, "found": found}
            for kind, found in self.found.items()
        ]


@dataclass
class Report:
    """What is said of one data set.

    Attributes:
        totals: "118287 pictures, 860001 annotations".
        counts: of each class, in `unit`.
    """

    findings: Findings
    totals: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    unit: str = "objects"

    def lines(self) -> list[str]:
        lines = [f"{self.findings.source}: {self.totals}"]
        if self.counts:
            numbers = sorted(self.counts.values())
            least, most = min(self.counts, key=self.counts.get), max(self.counts, key=self.counts.get)
            lines.append(
                f"  {len(numbers)} classes; {self.unit} of each: {numbers[0]} ({least}) to {numbers[-1]} ({most}), "
                f"median {statistics.median(numbers):g}"
            )
        return lines + self.findings.lines()


UNREADABLE = Kind("picture that cannot be read", "replace it or leave it out")
SIZE = Kind("size that is not the picture's", "write the picture's own height and width into the annotations")


def picture_sizes(path: str, *, whole: bool = False) -> set[tuple[int, int]]:
    """The (height, width) that a picture has as it is stored, and upright, if its EXIF turns it on its side.

    Args:
        whole: decode all of it, not only what tells its size.

    Raises:
        OSError: it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about large pictures, and tags that are none
        try:
            with open_picture(path) as picture:
                width, height = picture.size
                side = orientation(picture) in ON_ITS_SIDE
                if whole:
                    picture.load()
        except OSError:
            raise
        except Exception as error:  # Pillow's plug-ins raise SyntaxError, ValueError, struct.error, ...
            raise OSError(f"{type(error).__name__}: {error}") from error
    return {(height, width), (width, height)} if side else {(height, width)}


def compare_size(picture: tuple[str, tuple[int, int]], *, whole: bool = False) -> tuple[Kind, str] | None:
    """That a picture is of another (height, width) than is said; with `whole` also that it does not decode."""
    path, size = picture
    try:
        sizes = picture_sizes(path, whole=whole)
    except OSError as error:  # what is there, the pipeline's reader may know
        missing = whole or isinstance(error, FileNotFoundError)
        return (UNREADABLE, f"{path} cannot be read ({error.strerror or error})") if missing else None
    if tuple(size) in sizes:
        return None
    height, width = min(sizes)
    return SIZE, f"{path} is {height} x {width} pixels, not {size[0]} x {size[1]} as annotated"


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, spread over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def ask_all(ask: Callable[[Any], Any], items: Sequence[Any], workers: int, lost: Callable[[Any], Any]) -> Iterator[Any]:
    """`ask(item)` of all items in their order, by several processes. 0 workers: in this one.

    Args:
        lost: the answer for an item that ends its process, as decoders in C may.
    """
    if workers == 0:
        yield from map(ask, items)
        return
    start = 0
    while start < len(items):
        try:
            for answer in _in_pool(ask, items[start:], workers, CHUNK):
                yield answer
                start += 1
        except BrokenProcessPool:  # by one of those that were under way
            end = min(start + CHUNK * (workers + 2), len(items))
            for item in items[start:end]:
                try:
                    yield next(_in_pool(ask, [item], 1, 1))
                except BrokenProcessPool:
                    yield lost(item)
            start = end


def _in_pool(ask: Callable[[Any], Any], items: Sequence[Any], workers: int, chunk: int) -> Iterator[Any]:
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # others import torch in each
    pool = ProcessPoolExecutor(min(workers, len(items)), multiprocessing.get_context(method))
    try:
        yield from pool.map(ask, items, chunksize=chunk)
    finally:
        pool.shutdown(cancel_futures=True)
