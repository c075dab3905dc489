"""Kinetics' list files: a line `path label` for each clip, the path below a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from hvt_backbones.errors import InputError

MOST_CLASSES = 10**6  # of a list whose number of classes is not said


class Entry(NamedTuple):
    """A line of a list: its number from 1, the path as it stands there, the class from 0."""

    line: int
    path: str
    label: int


def read_list(file: str | Path, num_classes: int | None = None, delimiter: str = " ") -> tuple[list[Entry], list[str]]:
    """The clips of a list, and what is wrong with its other lines.

    The label is what follows the last delimiter, so that paths may have blanks. Empty lines are passed over.

    Args:
        file: the list.
        num_classes: labels are below it, where it is given.
        delimiter: " " for any white space.

    Raises:
        InputError: the file does not exist, is no text, or holds nothing.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")  # names may have other ends of lines
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: check the path of the list") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text ({error.reason}): give a list with a line `path label` each") from error
    entries: list[Entry] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, *rest = line.strip().rsplit(None if delimiter == " " else delimiter, 1)
        label = rest[0].strip() if rest else ""
        wrong = ""
        if not rest:
            wrong = f"{line.strip()!r} is not `path label`"
        elif not label.isascii() or not label.isdecimal():
            wrong = f"the label {label!r} of {path} is no whole number from 0"
        elif int(label) >= (num_classes or MOST_CLASSES):
            why = (
                f"{num_classes}, the number of classes" if num_classes else f"{MOST_CLASSES}, the most that a list has"
            )
            wrong = f"the label {label} of {path} is not below {why}"
        elif path in first:
            wrong = f"{path} is in line {first[path]} already"
        else:
            first[path] = number
            entries.append(Entry(number, path.strip(), int(label)))
        if wrong:
            problems.append(f"{file} line {number}: {wrong}")
    if not entries and not problems:
        raise InputError(f"{file} is empty: expected a line `path label` for each clip")
    return entries, problems


def clip_path(root: str | Path, path: str) -> str:
    """The file of a clip; mmaction2's lists may leave out `.mp4`."""
    return os.path.join(root, path if os.path.splitext(path)[1] else path + ".mp4")


def find_missing(entries: Sequence[Entry], root: str | Path) -> list[Entry]:
    """Those whose file does not exist; each folder is listed once, which file servers bear better."""

    @cache
    def names(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder or "."))
        except OSError:
            return frozenset()

    def exists(entry: Entry) -> bool:
        folder, name = os.path.split(clip_path(root, entry.path))
        return name in names(folder)

    return [entry for entry in entries if not exists(entry)]
