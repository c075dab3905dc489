"""`check` of detection and segmentation: all data sets of a configuration, looked through before training."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, init_default_scope

from hvt_backbones.errors import ArgumentParser, whole_number

from . import patches
from .application import Application
from .config import add_config_arguments, building, open_config
from .data import check_data
from .findings import Findings, Kind, Report, describe
from .parts import PARTS, data_of, evaluators_of
from .run import write_json

UNLISTED = Kind("no sample", "check ann_file, data_root and data_prefix")


def check(
    argv: Sequence[str] | None,
    application: Application,
    reads: str,
    look: Callable[[BaseDataset, bool, int], Report],
    look_at_evaluator: Callable[[Mapping[str, Any], set[str]], Report | None] = lambda evaluator, seen: None,
) -> int:
    """Print a report of each data set. Returns 1 if anything is wrong.

    Args:
        reads: what is looked at, for the help.
        look: reports on a data set that has not listed its samples yet; if quick, on what a training looks at before it
            starts; by so many processes.
        look_at_evaluator: reports on the file of an evaluator, unless it is among those that were seen.
    """
    parser = ArgumentParser(
        prog=f"python -m {application.name}.check",
        description=f"Look through the data of a configuration: {reads}. Exits with 1 if anything is wrong.",
        allow_abbrev=False,
    )
    add_config_arguments(parser, application)
    parser.add_argument("--quick", action="store_true", help="what every training looks at before it starts")
    parser.add_argument(
        "--workers", type=whole_number(), default=os.cpu_count() or 1, metavar="N", help="processes; 0: one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to FILE")
    args = parser.parse_args(argv)
    patches.import_framework(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    init_default_scope(cfg.get("default_scope", application.scope))
    check_data(cfg, PARTS, application.layout)
    reports = {}
    for part, report in _reports(cfg, args, look, look_at_evaluator):
        print(f"{part}: " + "\n".join(report.lines()), flush=True)
        reports.setdefault(part, []).append(
            {"source": report.findings.source, "counts": report.counts, "findings": report.findings.as_json()}
        )
    if args.json is not None:
        write_json(args.json, reports)
        print(f"written to {args.json}")
    wrong = [found for part in reports.values() for one in part for found in one["findings"] if found["wrong"]]
    return 1 if wrong else 0


def _reports(
    cfg: Config,
    args: argparse.Namespace,
    look: Callable[[BaseDataset, bool, int], Report],
    look_at_evaluator: Callable[[Mapping[str, Any], set[str]], Report | None],
) -> Iterator[tuple[str, Report]]:
    seen: dict[tuple[str, ...], str] = {}
    files = set()
    for part in PARTS:
        for config in data_of(cfg, part):
            with building(args.config):
                dataset = DATASETS.build({**config, "lazy_init": True, "serialize_data": False})
            key = tuple(
                str(getattr(dataset, one, None)) for one in ("ann_file", "data_prefix", "metainfo", "test_mode")
            )
            if key in seen:
                print(f"{part}: as {seen[key]}")
                continue
            seen[key] = part
            files.add(os.path.abspath(getattr(dataset, "ann_file", "") or ""))
            yield part, look(dataset, args.quick, args.workers)
        for evaluator in evaluators_of(cfg, part):
            if (report := look_at_evaluator(evaluator, files)) is not None:
                yield f"{part}_evaluator", report


def listed(dataset: BaseDataset) -> tuple[Findings, list[dict[str, Any]]]:
    """The samples of a data set, which are none if it cannot list them."""
    where = getattr(dataset, "ann_file", None) or getattr(dataset, "data_root", None) or type(dataset).__name__
    findings, samples = Findings(str(where)), []
    try:
        dataset.full_init()
        samples = dataset.data_list
    except Exception as error:  # of any type: each format has its own reader
        findings.add(UNLISTED, f"{type(dataset).__name__} cannot list its samples ({describe(error)})")
    if not samples and not findings.wrong:
        findings.add(UNLISTED, f"{type(dataset).__name__} holds no sample, or none that filter_cfg keeps")
    return findings, samples
