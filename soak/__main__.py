"""`python -m soak [--short] [PART ...]`: every pipeline on data with the oddities of the real sets, and a table."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.measure import machine, revision
from runner.quiet import quiet_imports

from .commands import Row, table
from .parts import PARTS

TOGETHER = 2  # each part keeps a core busy


def soak(name: str, folder: str, *, short: bool) -> list[Row]:
    """The rows of one part."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    place = Path(folder, name)
    place.mkdir()
    try:
        for row in PARTS[name](place, short=short):
            rows.append(row)
            print(f"{row.name}: {row.amount}, {len(row.faults)} faults, {row.seconds:.0f} s", flush=True)
    except Exception as error:  # the other parts are run all the same
        rows.append(Row(f"{name}: broken off", faults=[f"{type(error).__name__}: {error}"]))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a few samples of everything, in minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)}: choose of {', '.join(PARTS)}")
    quiet_imports()
    names, start = args.parts or list(PARTS), time.monotonic()
    # forked, so that tests can put parts of their own in their place
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        ProcessPoolExecutor(TOGETHER, get_context("fork")) as pool,
    ):
        rows = [row for part in pool.map(partial(soak, folder=folder, short=args.short), names) for row in part]
    command = shlex.join(["python", "-m", "soak", *(sys.argv[1:] if argv is None else argv)])
    cpu = machine(torch.device("cpu"))["cpu"]
    spent = f"{(time.monotonic() - start) / 60:.0f} minutes"
    found = f"{command}\n{cpu}, torch {torch.__version__}, revision {revision()}, {spent}\n{table(rows)}\n"
    print(found)
    if args.out:
        args.out.write_text(found)
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
