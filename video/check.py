"""Look through the clips of a list before training: `python -m video.check LIST --root DIR`."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import ArgumentParser, InputError, whole_number
from hvt_backbones.weights.report import some
from runner import command
from runner.findings import SHOWN, ask_all

from .decoders import ClipError, find_decoder, probe
from .lists import Entry, clip_path, find_missing, read_list


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m video.check",
        description="Read a list of clips: which are missing, unreadable or too short, and how many each class has. "
        "Exits with 1 if anything is wrong.",
        allow_abbrev=False,
    )
    parser.add_argument("list", type=Path, metavar="LIST", help="a line `path label` for each clip")
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="that the paths are below (default .)")
    parser.add_argument(
        "--min-frames", type=whole_number(1), default=1, metavar="N", help="fewer are too short (default 1)"
    )
    parser.add_argument(
        "--classes", type=whole_number(1), metavar="N", help="labels are below N (default: the largest and 1)"
    )
    parser.add_argument("--quick", action="store_true", help="decode only the first frame of each clip")
    parser.add_argument("--decoder", choices=("auto", "decord", "pyav"), default="auto", help="default: auto")
    parser.add_argument(
        "--workers", type=whole_number(), default=os.cpu_count() or 1, metavar="N", help="processes; 0: one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to FILE")
    parser.add_argument("--write-clean", type=Path, metavar="FILE", help="write a list without the clips that are bad")
    return parser


@command
def main(argv: Sequence[str] | None) -> int:
    """Returns 1 if a line or a clip is bad."""
    args = build_parser().parse_args(argv)
    for option in ("json", "write_clean"):
        if (path := getattr(args, option)) is not None and path.resolve() == args.list.resolve():
            raise InputError(f"--{option.replace('_', '-')} {path} is the list itself: name another file")
    if not args.root.is_dir():
        raise InputError(f"--root {args.root} is no folder: name the one that the paths in {args.list} are below")
    report, good = check(
        args.list, args.root, min_frames=args.min_frames, classes=args.classes, quick=args.quick,
        decoder=args.decoder, workers=args.workers,
    )  # fmt: skip
    print("\n".join(table(report)))
    if args.json is not None:
        with whole_file(args.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")
    if args.write_clean is not None:
        if not good:
            raise InputError(f"--write-clean {args.write_clean}: none of the clips is good, so nothing was written")
        with whole_file(args.write_clean) as partial:
            partial.write_text("".join(f"{entry.path} {entry.label}\n" for entry in good), encoding="utf-8")
        print(f"{len(good)} clips in {args.write_clean}")
    return 1 if any(report[kind] for kind in PROBLEMS) else 0


PROBLEMS = {"wrong_lines": "wrong lines", "missing": "missing", "unreadable": "unreadable", "too_short": "too short"}


def check(
    file: Path,
    root: Path,
    *,
    min_frames: int = 1,
    classes: int | None = None,
    quick: bool = False,
    decoder: str = "auto",
    workers: int = 0,
) -> tuple[dict[str, Any], list[Entry]]:
    """Read a list and the clips in it.

    Returns:
        A report: `clips`, a list for each of `PROBLEMS`, `class_counts` of the good clips and the rest of the table;
        and the good clips.

    Raises:
        InputError: the list cannot be read at all, or no decoder imports.
    """
    from tqdm import tqdm

    chosen = find_decoder(decoder)
    print(f"clips are decoded by {chosen.name}: {chosen.reason}")
    entries, wrong_lines = read_list(file, classes)
    missing = set(find_missing(entries, root))
    there = [entry for entry in entries if entry not in missing]
    found: dict[str, list[dict[str, Any]]] = {
        "missing": [_problem(entry, "does not exist") for entry in entries if entry in missing],
        "unreadable": [],
        "too_short": [],
    }
    good = []
    ask = partial(_probe, decoder=chosen.setting, quick=quick)
    paths = [clip_path(root, entry.path) for entry in there]
    results = ask_all(ask, paths, workers, lambda path: f"ends {chosen.setting}, and the process with it")
    progress = tqdm(results, desc="check", total=len(there), unit="clip", dynamic_ncols=True)
    for entry, result in zip(there, progress, strict=True):
        if isinstance(result, str):
            found["unreadable"].append(_problem(entry, result))
        elif result < min_frames:
            found["too_short"].append(_problem(entry, f"has {result} frames of at least {min_frames}"))
        else:
            good.append(entry)
    counts = [0] * (classes or 1 + max((entry.label for entry in entries), default=-1))
    for entry in good:
        counts[entry.label] += 1
    report = {
        "list": str(file), "root": str(root), "decoder": chosen.name, "quick": quick, "min_frames": min_frames,
        "clips": len(entries) + len(wrong_lines), "good": len(good), "wrong_lines": wrong_lines, **found,
        "class_counts": counts,
    }  # fmt: skip
    return report, good


def _problem(entry: Entry, reason: str) -> dict[str, Any]:
    return {"line": entry.line, "path": entry.path, "label": entry.label, "reason": reason}


def table(report: dict[str, Any]) -> list[str]:
    """The lines that are printed."""
    lines = [f"{report['list']}: {report['clips']} clips, {report['good']} good"]
    lines += [f"  {name:<12}{len(report[kind]):>8}" for kind, name in PROBLEMS.items()]
    if counts := report["class_counts"]:
        least, most = min(counts), max(counts)
        lines.append(
            f"{len(counts)} classes; good clips of each: {least} (class {counts.index(least)}) to {most} "
            f"(class {counts.index(most)}), median {statistics.median(counts):g}"
        )
        if empty := [str(label) for label, count in enumerate(counts) if count == 0]:
            lines.append(f"{len(empty)} classes without a good clip: {some(empty, SHOWN)}")
    for kind in PROBLEMS:
        for one in report[kind][:SHOWN]:
            lines.append(one if isinstance(one, str) else f"line {one['line']}: {one['path']} {one['reason']}")
        if len(report[kind]) > SHOWN:
            lines.append(f"and {len(report[kind]) - SHOWN} more {PROBLEMS[kind]}; --json FILE has all")
    return lines


def _probe(path: str, *, decoder: str, quick: bool) -> int | str:
    """The number of frames of a clip, or what is wrong with it."""
    try:
        return probe(path, decoder, quick=quick)
    except ClipError as error:
        return str(error)


if __name__ == "__main__":
    raise SystemExit(main())
