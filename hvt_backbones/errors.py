"""The errors that a user can cause, and how a command reports them."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

# what a path can be wrong with that is the user's to mend
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOSPC)


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what, the value, and what to do."""


class WeightsError(InputError):
    """Weights that cannot be found, read, verified or matched with the model."""


def nearest(
    word: str, known: Sequence[str], *, most: int = 3, cutoff: float = 0.5, otherwise: str | None = None
) -> str:
    """What a message about an unknown word says: those that it may have meant, nearest first, else what there are.

    Args:
        most: words that are named.
        cutoff: how like it they are, from 0 to 1 (`difflib`).
        otherwise: what is said where none is, instead of some that are known.
    """
    close = difflib.get_close_matches(word, known, n=most, cutoff=cutoff)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if otherwise is not None:
        return otherwise
    return f"known: {', '.join(list(known)[:8])}{', ...' if len(known) > 8 else ''}" if known else "there are none"


class ArgumentParser(argparse.ArgumentParser):
    """Reports a wrong argument as `InputError`, in one line like everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see `{self.prog} --help`")


def whole_number(least: int = 0) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number of at least `least`, and of fewer than ten digits."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return parse


def whole_numbers(text: str) -> list[int]:
    """The `type` of an argument that is whole numbers from 1 with commas between; each counts once."""
    return list(dict.fromkeys(map(whole_number(1), text.split(","))))


def share(text: str) -> float:
    """The `type` of an argument that is a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def positive_share(text: str) -> float:
    """The `type` of an argument that is a number above 0, up to 1."""
    if not share(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, up to 1")
    return float(text)


def exit_on_input_error(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make a command's `main` report `InputError` as one line on stderr and exit with status 2.

    So it does with a path that cannot be used. A keyboard interrupt exits with 130, as shells expect, and output that
    nobody reads any more (`| head`) with 141; anything else is a defect and keeps its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv) or 0
            sys.stdout.flush()
            return status
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            return 141
        except OSError as error:
            if error.filename is None or error.errno not in PATH_ERRORS:
                raise
            print(f"error: {error.filename}: {error.strerror}: check the path and who may use it", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


def _reader_is_gone() -> bool:
    """Whether it is stdout that is broken, not a pipe to another process; if so, Python shall not try it again."""
    stdout = select.poll()
    stdout.register(1, 0)
    if not stdout.poll(0):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    return True
