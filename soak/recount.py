"""Predictions counted once more, by programs that share nothing with the commands but the files."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

IGNORED = 255


def top1(found: Mapping[str, int], truth: Mapping[str, int]) -> float:
    """Percent of the files whose most likely class is the right one."""
    return 100 * sum(found.get(name) == label for name, label in truth.items()) / len(truth)


def average_precision(annotations: Path, results: Path, kind: str) -> float:
    """COCO's AP by pycocotools, of `bbox` or `segm`, from files of COCO's formats.

    Where a mask begins with two points, which pycocotools takes for a box of its own or does not draw, the object's box
    is its mask.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        mask = annotation["segmentation"]
        if isinstance(mask, list) and len(mask[0]) <= 4:
            left, top, width, height = annotation["bbox"]
            right, bottom = left + width, top + height
            annotation["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        if not json.loads(results.read_text()):
            return 0.0
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


def mean_iou(pairs: Iterable[tuple[Path, Path]], classes: int) -> float:
    """Percent, over the classes that occur in either; both maps have 0 for nothing and 1 for the first class."""
    both, predicted, true = (np.zeros(classes + 1) for _ in range(3))
    for found, drawn in pairs:
        labels, given = (np.asarray(Image.open(path)) for path in (found, drawn))
        counts = (given != 0) & (given != IGNORED)
        bins = {"minlength": classes + 1}
        both += np.bincount(given[counts & (labels == given)], **bins)
        predicted += np.bincount(labels[counts], **bins)
        true += np.bincount(given[counts], **bins)
    union = (predicted + true - both)[1:]
    return float(100 * np.mean(both[1:][union > 0] / union[union > 0]))
