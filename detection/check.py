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
    from runner.findings import Findings, Report

READS = "ids, boxes, masks, areas and classes of the annotations, and every picture and its size"


@command
def main(argv: Sequence[str] | None) -> int:
    """Returns 1 if anything is wrong."""
    from runner.check import check

    return check(argv, DETECTION, READS, look, look_at_evaluator)


def look(dataset: Any, quick: bool, workers: int) -> Report:
    """Report on a data set: COCO's files are known to the letter, of others what they list."""
    from mmdet.datasets import CocoDataset, Objects365V1Dataset, Objects365V2Dataset

    from runner.annotation_guard import use_of
    from runner.annotations import CATEGORY, compare_classes, inspect, read_json

    kind, sorted_kinds = type(dataset), (Objects365V1Dataset, Objects365V2Dataset)
    known = [one.load_data_list for one in (CocoDataset, *sorted_kinds)]
    if getattr(kind, "load_data_list", None) not in known or kind.COCOAPI is not CocoDataset.COCOAPI:
        return _look_at_list(dataset, quick, workers)
    content = read_json(dataset.ann_file)
    report = inspect(content, dataset.ann_file, use_of(dataset))
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
    _look_at_pictures(report.findings, pictures, quick, workers)
    return report


def look_at_evaluator(evaluator: Mapping[str, Any], seen: set[str]) -> Report | None:
    """Report on the file that COCO's metric compares with, unless it was seen."""
    from runner.annotations import Use, inspect, read_json
    from runner.parts import type_name

    file = evaluator.get("ann_file")
    if type_name(evaluator) != "CocoMetric" or not file or os.path.abspath(file) in seen:
        return None
    seen.add(os.path.abspath(file))
    return inspect(read_json(file), file, Use(masks="segm" in evaluator.get("metric", "bbox")))


def _look_at_list(dataset: Any, quick: bool, workers: int) -> Report:
    """What any data set of mmdetection lists: files, sizes, labels."""
    from runner.check import listed
    from runner.findings import Report

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
    _look_at_pictures(findings, pictures, quick, workers)
    return report


def _look_at_pictures(
    findings: Findings, pictures: list[tuple[str, tuple[int, int]]], quick: bool, workers: int
) -> None:
    from tqdm import tqdm

    from runner.data import SAMPLE
    from runner.findings import UNREADABLE, ask_all, compare_size, evenly

    def lost(picture: tuple[str, tuple[int, int]]) -> Any:
        return UNREADABLE, f"{picture[0]} ends the process that reads it"

    if quick:
        pictures = evenly(pictures, SAMPLE)
    answers = ask_all(functools.partial(compare_size, whole=not quick), pictures, workers, lost)
    for found in tqdm(answers, desc="check", total=len(pictures), unit="picture", dynamic_ncols=True, disable=None):
        if found is not None:
            findings.add(*found)


if __name__ == "__main__":
    raise SystemExit(main())
