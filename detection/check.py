"""Look through annotations and pictures before training: `python -m detection.check CONFIG`."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner import command

from .zoo import DETECTION

if TYPE_CHECKING:
    from runner.annotations import Use
    from runner.check import Extent, Report
    from runner.findings import Findings

READS = "ids, boxes, masks, areas and classes of the annotations, and every picture and its size"


@command
def main(argv: Sequence[str] | None) -> int:
    """Returns 1 if anything is wrong."""
    from runner.check import check

    return check(argv, DETECTION, READS, look, look_at_evaluator)


def look(dataset: Any, extent: Extent) -> Report:
    """Report on a data set: COCO's files are known to the letter, of others what they list."""
    from mmdet.datasets import CocoDataset, Objects365V1Dataset, Objects365V2Dataset

    from runner.annotation_guard import use_of
    from runner.annotations import CATEGORY, compare_classes

    kind, sorted_kinds = type(dataset), (Objects365V1Dataset, Objects365V2Dataset)
    known = [one.load_data_list for one in (CocoDataset, *sorted_kinds)]
    if getattr(kind, "load_data_list", None) not in known or kind.COCOAPI is not CocoDataset.COCOAPI:
        return _look_at_list(dataset, extent)
    content, report = _read(dataset.ann_file, use_of(dataset))
    if not report.counts:  # it has not the form
        return report
    if CATEGORY not in report.findings.found:
        categories = content["categories"]
        if isinstance(dataset, sorted_kinds):
            categories = sorted(categories, key=lambda category: category["id"])
        compare_classes(report.findings, categories, dataset.metainfo.get("classes") or (), all_there=True)
    folder = dataset.data_prefix.get("img") or ""
    pictures = [
        (os.path.join(folder, image["file_name"]), (image["height"], image["width"]))
        for image in content["images"]
        if isinstance(image.get("file_name"), str) and image.get("height") and image.get("width")
    ]
    _look_at_pictures(report.findings, pictures, extent)
    return report


def look_at_evaluator(evaluator: Mapping[str, Any], seen: set[str]) -> Report | None:
    """Report on the file that COCO's metric compares with, unless it was seen."""
    from runner.annotations import Use

    file = evaluator.get("ann_file")
    if str(evaluator.get("type")).rpartition(".")[2] != "CocoMetric" or not file or os.path.abspath(file) in seen:
        return None
    seen.add(os.path.abspath(file))
    return _read(file, Use(masks="segm" in evaluator.get("metric", "bbox")))[1]


def _read(file: str, use: Use) -> tuple[dict[str, Any], Report]:
    from runner.annotations import inspect, read_json
    from runner.check import Report

    content = read_json(file)
    found = inspect(content, file, use)
    return content, Report(found.findings, f"{found.images} pictures, {found.annotations} annotations", found.counts)


def _look_at_list(dataset: Any, extent: Extent) -> Report:
    """What any data set of mmdetection lists: files, sizes, labels."""
    from runner.check import Report, listed

    findings, samples = listed(dataset)
    classes = dataset.metainfo.get("classes") or ()
    instances = [one for sample in samples for one in sample.get("instances") or ()]
    labels = Counter(one.get("bbox_label") for one in instances)
    known = f"{type(dataset).__name__}: beyond what it lists, nothing is known here of its annotations"
    report = Report(findings, f"{len(samples)} samples, {len(instances)} objects ({known})")
    report.counts = {name: labels[number] for number, name in enumerate(classes)}
    pictures = [
        (one["img_path"], (one["height"], one["width"])) for one in samples if "height" in one and "img_path" in one
    ]
    _look_at_pictures(findings, pictures, extent)
    return report


def _look_at_pictures(findings: Findings, pictures: list[tuple[str, tuple[int, int]]], extent: Extent) -> None:
    from runner.findings import ask_all, evenly
    from runner.samples import SAMPLE, compare_size

    if extent.quick:
        pictures = evenly(pictures, SAMPLE)
    for found in ask_all(functools.partial(compare_size, whole=not extent.quick), pictures, extent.workers, "picture"):
        if found is not None:
            findings.add(*found)


if __name__ == "__main__":
    raise SystemExit(main())
