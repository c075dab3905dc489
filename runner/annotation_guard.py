"""mmdetection's data sets and COCO's metric, told to inspect and mend the annotations that they load."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from mmengine.logging import print_log

from hvt_backbones.errors import InputError

from .annotations import Use, compare_classes, inspect
from .findings import Findings, describe

_use: ContextVar[Use | None] = ContextVar("_use", default=None)
_told: set[str] = set()  # an evaluation reads the file of its data set again


@contextlib.contextmanager
def _reading(use: Use) -> Iterator[None]:
    token = _use.set(use)
    try:
        yield
    finally:
        _use.reset(token)


def use_of(dataset: Any) -> Use:
    """What a data set of mmdetection reads its annotations for."""
    masks = any(getattr(step, "with_mask", False) for step in dataset.pipeline.transforms)
    classes = dataset.metainfo.get("classes")
    return Use(masks=masks, training=not dataset.test_mode, classes=tuple(classes) if classes else None)


def tell(findings: Findings, application: str) -> None:
    """Refuse what is wrong; say the rest in one line of the log, once.

    Raises:
        InputError: something is wrong.
    """
    findings.refuse(f"python -m {application}.check")
    if (said := findings.summary()) and said not in _told:
        _told.add(said)
        print_log(said, logger="current", level=logging.WARNING)


def check_order(coco: Any, classes: Sequence[str] | None, *, all_there: bool = False) -> None:
    """
    Raises:
        InputError: the categories of a loaded file are in another order than the classes.
    """
    findings = Findings(coco.source)
    compare_classes(findings, coco.dataset["categories"], classes or (), all_there=all_there)
    tell(findings, "detection")


# What `patches` calls in place of methods of mmdetection: of `BaseDetDataset`, `COCO` and `CocoMetric`. What is wrong
# with a file is an `InputError` as it is loaded.


def full_init(method: Callable[..., None], dataset: Any) -> None:
    with _reading(use_of(dataset)):
        method(dataset)


def open_file(method: Callable[..., None], coco: Any, annotation_file: str | None = None) -> None:
    coco.source = str(annotation_file)
    try:
        method(coco, annotation_file)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{annotation_file} is no JSON ({describe(error)}): write it anew") from error
    except AssertionError as error:
        raise InputError(f"{annotation_file}: {describe(error)}: expected COCO's annotations") from error


def create_index(method: Callable[..., None], coco: Any) -> None:
    if (use := _use.get()) is not None:
        tell(inspect(coco.dataset, coco.source, use).findings, "detection")
    method(coco)


def get_cat_ids(
    method: Callable[..., list[int]], coco: Any, cat_names: Sequence[str] = (), *rest: Any, **arguments: Any
) -> list[int]:
    check_order(coco, cat_names)
    return method(coco, cat_names, *rest, **arguments)


def open_metric(
    method: Callable[..., None],
    coco_metric: Any,
    ann_file: Any = None,
    metric: Any = "bbox",
    *args: Any,
    **arguments: Any,
) -> None:
    with _reading(Use(masks="segm" in metric)):
        method(coco_metric, ann_file, metric, *args, **arguments)


def set_meta(setter: Callable[[Any, Any], None], metric: Any, value: Any) -> None:
    setter(metric, value)
    if metric._coco_api is not None:  # else the annotations come with the pictures
        check_order(metric._coco_api, (value or {}).get("classes"), all_there=True)
