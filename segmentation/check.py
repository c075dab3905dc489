"""Look through maps and pictures before training: `python -m segmentation.check CONFIG`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner import command

from .zoo import SEGMENTATION

if TYPE_CHECKING:
    from runner.findings import Report

READS = "every map, its numbers and its size, and every picture"


@command
def main(argv: Sequence[str] | None) -> int:
    """Returns 1 if anything is wrong."""
    from runner.check import check

    return check(argv, SEGMENTATION, READS, look)


def look(dataset: Any, quick: bool, workers: int) -> Report:
    """Report on a data set of mmsegmentation, of whatever type: they all list pictures and maps."""
    from tqdm import tqdm

    from runner.check import listed
    from runner.data import SAMPLE, is_segmentation
    from runner.findings import UNREADABLE, Report, ask_all, evenly
    from runner.maps import Inspected, gather, inspect, numbers_of, readers_of

    def lost(pair: tuple[str, str]) -> Inspected:
        return Inspected([(UNREADABLE, f"{pair[1]} or its picture {pair[0]} ends the process that reads it")])

    findings, samples = listed(dataset)
    kind = type(dataset).__name__
    if not is_segmentation(dataset) or not readers_of(dataset):
        return Report(findings, f"{len(samples)} samples (how the maps of this {kind} are read is not known here)")
    if not all("seg_map_path" in sample for sample in samples):
        return Report(findings, f"{len(samples)} pictures without maps")
    pairs = [(sample["img_path"], sample["seg_map_path"]) for sample in samples]
    chosen = evenly(pairs, SAMPLE) if quick else pairs
    ask = functools.partial(inspect, numbers=numbers_of(dataset), whole=not quick)
    maps = tqdm(
        ask_all(ask, chosen, workers, lost),
        desc="check",
        total=len(chosen),
        unit="map",
        dynamic_ncols=True,
        disable=None,
    )
    counts = gather(findings, maps, dataset.metainfo.get("classes") or (), len(pairs))
    return Report(findings, f"{len(pairs)} pictures, {len(chosen)} maps read", counts, "maps")


if __name__ == "__main__":
    raise SystemExit(main())
