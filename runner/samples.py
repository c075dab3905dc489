"""The quick part of `check`, before every training and test: what some pictures and maps of a data set say."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from . import maps
from .annotation_guard import tell
from .findings import UNREADABLE, Findings, Kind, evenly, picture_sizes

SAMPLE = 100  # pictures: a second or two
SIZE = Kind("size that is not the picture's", "write the picture's own height and width into the annotations")


def check_samples(dataset: Any) -> None:
    """Look at some samples of a data set that has just listed them; all of a small one.

    Raises:
        InputError: a picture's size is not what its annotations say, or its map is none.
    """
    segmentation = is_segmentation(dataset)
    samples = [sample for sample in evenly(dataset.data_list, SAMPLE) if is_local(sample)]
    if getattr(dataset, "backend_args", None) is not None or not samples:
        return
    if segmentation and "seg_map_path" in samples[0] and maps.readers_of(dataset):
        numbers = maps.numbers_of(dataset)
        found = (maps.inspect((sample["img_path"], sample["seg_map_path"]), numbers) for sample in samples)
        findings = Findings(str(dataset.data_prefix["seg_map_path"]))
        maps.gather(findings, found, dataset.metainfo.get("classes") or (), len(dataset.data_list))
        tell(findings, "segmentation")
    elif not segmentation and "height" in samples[0] and "width" in samples[0]:
        findings = Findings(str(dataset.ann_file))
        for sample in samples:
            if (odd := compare_size((sample["img_path"], (sample["height"], sample["width"])))) is not None:
                findings.add(*odd)
        tell(findings, "detection")


def is_local(sample: Mapping[str, Any]) -> bool:
    return isinstance(sample.get("img_path"), str) and "://" not in sample["img_path"]


def is_segmentation(dataset: Any) -> bool:
    """Whether it is one of mmsegmentation's."""
    framework = sys.modules.get("mmseg.datasets")  # which has been imported if it is
    return framework is not None and isinstance(dataset, framework.BaseSegDataset)


def compare_size(picture: tuple[str, tuple[int, int]], *, whole: bool = False) -> tuple[Kind, str] | None:
    """That a picture is of another (height, width) than is said; with `whole` also that it does not decode."""
    path, size = picture
    try:
        sizes = picture_sizes(path, whole=whole)
    except OSError as error:  # what is there, the pipeline's reader may know
        missing = whole or isinstance(error, FileNotFoundError)
        return (UNREADABLE, f"{path} cannot be read ({error.strerror or error})") if missing else None
    if tuple(size) in sizes:
        return None
    height, width = min(sizes)
    return SIZE, f"{path} is {height} x {width} pixels, not {size[0]} x {size[1]} as annotated"
