"""What is odd in a data set, kind by kind; and what can be asked of each of its pictures, by several processes."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from hvt_backbones.errors import InputError
from hvt_backbones.images import ON_ITS_SIDE, open_picture, orientation

CHUNK = 16  # pictures that a process takes at a time
SHOWN = 20  # of each kind; --json has all


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


UNREADABLE = Kind("picture that cannot be read", "replace it or leave it out")


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


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, spread over all of them."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def ask_all(ask: Callable[[Any], Any], items: Sequence[Any], workers: int, unit: str) -> Iterator[Any]:
    """`ask(item)` of all items in their order, by several processes, with a progress bar. 0 workers: in this one."""
    from tqdm import tqdm

    with tqdm(desc="check", total=len(items), unit=unit, dynamic_ncols=True, disable=None) as progress:
        for answer in _answers(ask, items, workers):
            progress.update()
            yield answer


def _answers(ask: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    if workers == 0 or len(items) <= CHUNK:
        yield from map(ask, items)
        return
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None  # others import torch in each
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method))
    try:
        yield from pool.map(ask, items, chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} processes was ended, for want of memory perhaps: lower --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
