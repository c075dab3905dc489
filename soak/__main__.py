"""`python -m soak [--short] [PART ...]`: every pipeline on data with the oddities of the real sets, and a table."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.measure import machine, revision

from .commands import Row, table
from .parts import PARTS


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a few samples of everything, in minutes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"unknown part {min(unknown)}: choose of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        for name in args.parts or PARTS:
            place = Path(folder, name)
            place.mkdir()
            try:
                for row in PARTS[name](place, short=args.short):
                    rows.append(row)
                    print(f"{row.name}: {row.amount}, {len(row.faults)} faults, {row.seconds:.0f} s", flush=True)
            except Exception as error:  # the other parts are run all the same
                rows.append(Row(f"{name}: broken off", faults=[f"{type(error).__name__}: {error}"]))
    command = shlex.join(["python", "-m", "soak", *(sys.argv[1:] if argv is None else argv)])
    cpu = machine(torch.device("cpu"))["cpu"]
    found = f"{command}\n{cpu}, torch {torch.__version__}, revision {revision()}\n{table(rows)}\n"
    print(found)
    if args.out:
        args.out.write_text(found)
    return 1 if any(row.faults for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
