"""COCO's annotation files: what is wrong in one, and what is mended in memory as it is loaded.

Mended is what has one meaning and is common: ids of annotations that pycocotools loses (0, equal, missing), `iscrowd`
and `area` that are missing. An object without a mask, where masks are asked for, is not learned, and its box counts.
The rest is refused.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvt_backbones.errors import InputError
from hvt_backbones.weights.report import some

from .findings import Findings, Kind, Report, describe

NUMBER = "ids are whole numbers, each given once"
STRUCTURE = Kind("not COCO's form", "expected {images: [...], annotations: [...], categories: [...]}")
IMAGE_ID = Kind("id of a picture", NUMBER)
FILE_NAME = Kind("picture without file_name", "give its path below the folder of pictures")
IMAGE_SIZE = Kind("picture without height or width", "give both in pixels, as the file has them")
CATEGORY = Kind("category without id or name", NUMBER + ", and each has a name of its own")
ORDER = Kind(
    "classes in another order", "write metainfo.classes in this order: labels are numbered as the file lists them"
)
LACKING = Kind("class without category", "name those that it has by the data set's metainfo.classes")
IMAGE_OF = Kind("image_id that is no number", "write the picture's id as a number, so that the picture has its objects")
CATEGORY_OF = Kind(
    "category_id that is no number", "write the category's id as a number, so that the object has its class"
)
UNKNOWN = Kind("category_id that categories lack", "add the category, or remove the annotation")
BOX = Kind("box that is none", "give bbox as [left, top, width, height] in pixels")
CROWD = Kind("iscrowd that is neither 0 nor 1", "write 1 for a crowd, else 0")
MASK = Kind("segmentation of another form", "give [[x1, y1, x2, y2, ...], ...] or {size: [height, width], counts: ...}")
NO_MASKS = Kind("object without a mask", "over half have none: give polygons, or take a model that needs no masks")
NOTHING_LEFT = Kind(
    "object that is left out", "over half would be: check bbox (left, top, width, height in pixels) and area"
)
NO_OBJECT = Kind("no object", "annotate the pictures, or name the classes that the file has by metainfo.classes")

ANNOTATION_ID = Kind("id that pycocotools loses", "all annotations numbered from 1 in memory", wrong=False)
NO_CROWD = Kind("annotation without iscrowd", "taken for 0", wrong=False)
NO_AREA = Kind("annotation without area", "computed from its mask or box", wrong=False)
NO_MASK = Kind("object without a mask of 3 points", "taken for a crowd, which is not learned", wrong=False)
BOX_FOR_MASK = Kind("object without a mask of 3 points", "its box counts as its mask", wrong=False)
PART = Kind("part of a mask under 3 points", "left out", wrong=False)
TWICE = Kind("picture listed twice", "the objects of each are background to the other: merge them", wrong=False)
NOT_LISTED = Kind("annotation of a picture not listed", "left out", wrong=False)
OTHER_CLASS = Kind("classes that are not asked for", "left out", wrong=False)
OUTSIDE = Kind("box outside of its picture", "left out of training", wrong=False)
OVER_EDGE = Kind("box far over its picture's edge", "over a third are: bbox is [left, top, width, height]", wrong=False)
TINY = Kind("box narrower than a pixel", "left out of training", wrong=False)
NO_SURFACE = Kind("object of area 0", "left out of training", wrong=False)
NEVER = Kind("class that never occurs", "it is not learned, or not in the mean AP", wrong=False)
EDGE = 0.1  # of a side: pictures that were cropped have boxes that reach over the edge


@dataclass(frozen=True)
class Use:
    """What a file is read for: `classes` None where they are not known."""

    masks: bool = False
    training: bool = False
    classes: tuple[str, ...] | None = None


def inspect(content: Any, source: str, use: Use) -> Report:
    """Look through the content of a file, and mend it in place. Counted are objects that are learned or compared."""
    findings = Findings(source)
    report = Report(findings, "0 pictures, 0 annotations")
    if not isinstance(content, dict):
        findings.add(STRUCTURE, f"it holds a {type(content).__name__}")
        return report
    lists = {"images", "categories", *(("annotations",) if use.training or "annotations" in content else ())}
    for key in sorted(lists):
        if key not in content:
            findings.add(STRUCTURE, f"the key {key!r} is missing")
        elif not isinstance(content[key], list) or not all(isinstance(one, dict) for one in content[key]):
            findings.add(STRUCTURE, f"{key!r} is no list of dictionaries")
    if findings.wrong:
        return report
    sizes = _inspect_images(content["images"], findings)
    names = _inspect_categories(content["categories"], findings)
    annotations = content.get("annotations", [])
    report.totals = f"{len(content['images'])} pictures, {len(annotations)} annotations"
    report.counts = _Annotations(findings, sizes, names, use).inspect(annotations)
    return report


def read_json(file: str) -> Any:
    """
    Raises:
        InputError: it is none.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))  # as pycocotools: no mark of the order of bytes
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({describe(error)}): write it anew") from error


def whole(number: Any) -> bool:
    return finite(number) and number == int(number)


def finite(number: Any) -> bool:
    """Whether it is a number, of which a float can be made."""
    return type(number) in (int, float) and abs(number) <= sys.float_info.max


def _inspect_images(images: list[dict[str, Any]], findings: Findings) -> dict[int, tuple[int, int]]:
    """(height, width) by id."""
    sizes: dict[int, tuple[int, int]] = {}
    names: dict[int, Any] = {}
    first: dict[str, Any] = {}
    for image in images:
        identity, name = image.get("id"), image.get("file_name")
        if not isinstance(name, str) or not name:
            findings.add(FILE_NAME, f"the picture of id {identity!r} has the file_name {name!r}")
        elif first.setdefault(name, identity) != identity:
            findings.add(TWICE, f"{name} has the ids {first[name]!r} and {identity!r}")
        if not whole(identity):
            findings.add(IMAGE_ID, f"{name} has the id {identity!r}")
            continue
        if identity in sizes:
            findings.add(IMAGE_ID, f"{names[identity]} and {name} have the same id {identity}")
        height, width = image.get("height"), image.get("width")
        if not (whole(height) and whole(width) and height > 0 and width > 0):
            lacking = [f"{key} {image.get(key)!r}" for key in ("height", "width")]
            findings.add(IMAGE_SIZE, f"{name} (id {identity}) has {' and '.join(lacking)}")
            height = width = 0
        sizes[identity], names[identity] = (int(height), int(width)), name
    return sizes


def _inspect_categories(categories: list[dict[str, Any]], findings: Findings) -> dict[int, str]:
    """Name by id."""
    names: dict[int, str] = {}
    for category in categories:
        identity, name = category.get("id"), category.get("name")
        if not whole(identity) or not isinstance(name, str) or not name:
            findings.add(CATEGORY, f"a category has the id {identity!r} and the name {name!r}")
        elif identity in names:
            findings.add(CATEGORY, f"the categories {names[identity]} and {name} have the same id {identity}")
        elif name in names.values():
            findings.add(CATEGORY, f"two categories, of which one has the id {identity}, have the name {name}")
        else:
            names[identity] = name
    return names


def compare_classes(
    findings: Findings, categories: Sequence[dict[str, Any]], classes: Sequence[str], *, all_there: bool
) -> None:
    """mmdetection numbers labels in the order of the file's categories, whatever that of the classes is.

    Args:
        all_there: the file has to have each of the classes.
    """
    names = [category.get("name") for category in categories]
    listed = [name for name in names if name in set(classes)]
    if lacking := [name for name in classes if name not in set(listed)]:
        if all_there:
            findings.add(LACKING, f"it has {len(set(listed))} of the {len(classes)} classes, not {some(lacking)}")
    elif listed != list(classes):
        at = next((i for i, (name, other) in enumerate(zip(classes, listed, strict=False)) if name != other), 0)
        findings.add(
            ORDER, f"the categories are in the order {some(listed[at:])}, the classes {some(list(classes)[at:])}"
        )


@dataclass
class _Annotations:
    findings: Findings
    sizes: dict[int, tuple[int, int]]
    names: dict[int, str]
    use: Use

    def inspect(self, annotations: list[dict[str, Any]]) -> dict[str, int]:
        """Objects of each class."""
        findings, counts = self.findings, Counter[str]()
        wanted = None if self.use.classes is None else set(self.use.classes)
        objects, others = 0, Counter[str]()
        for annotation in annotations:
            name = self._name_of(annotation)
            if name is None:
                continue
            if wanted is not None and name not in wanted:
                others[name] += 1
                continue
            objects += 1
            if self._is_object(annotation):
                counts[name] += 1
        if others:
            findings.add(OTHER_CLASS, f"{others.total()} of {len(annotations)} are of {some(list(others))}")
        self._number(annotations)
        if not findings.wrong:  # else these follow from what is wrong
            self._weigh(objects, len(annotations), counts)
        named = {name: counts[name] for name in self.use.classes or self.names.values()}
        missing = [name for name, count in named.items() if not count]
        if missing and not findings.wrong and annotations:
            findings.add(NEVER, f"{len(missing)} of {len(named)} classes never occur, {some(missing)}")
        return named

    def _name_of(self, annotation: dict[str, Any]) -> str | None:
        """The class of an annotation that has one, of a picture that is listed."""
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not whole(image):
            self.findings.add(IMAGE_OF, f"{_named(annotation)} has the image_id {image!r}")
        elif not whole(category):
            self.findings.add(CATEGORY_OF, f"{_named(annotation)} has the category_id {category!r}")
        elif image not in self.sizes:
            self.findings.add(NOT_LISTED, f"{_named(annotation)} has the image_id {image}, which images lack")
        elif category not in self.names:
            known = some([str(number) for number in self.names])
            self.findings.add(UNKNOWN, f"{_named(annotation)} has the category_id {category}, categories have {known}")
        else:
            return self.names[category]
        return None

    def _is_object(self, annotation: dict[str, Any]) -> bool:
        """Whether it is learned or counted."""
        findings = self.findings
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(finite, box)) or box[2] < 0 or box[3] < 0:
            findings.add(BOX, f"{_named(annotation)} has the bbox {box!r}")
            return False
        if annotation.get("iscrowd") is None:
            findings.add(NO_CROWD, f"{_named(annotation)} has no iscrowd")
            annotation["iscrowd"] = 0
        elif annotation["iscrowd"] not in (0, 1):  # True and False are 1 and 0
            findings.add(CROWD, f"{_named(annotation)} has the iscrowd {annotation['iscrowd']!r}")
        height, width = self.sizes[annotation["image_id"]]
        has_mask = self.use.masks and self._check_mask(annotation, height, width)
        if not finite(annotation.get("area")):
            findings.add(NO_AREA, f"{_named(annotation)} has the area {annotation.get('area')!r}")
            annotation["area"] = _area(annotation, height, width)
        left, top, across, down = box
        beside = min(left + across, width) <= max(left, 0) or min(top + down, height) <= max(top, 0)
        if beside and across and down and height:
            findings.add(OUTSIDE, f"{_named(annotation)} has the bbox {box} in a picture of {height} x {width}")
            return False
        if across < 1 or down < 1:
            findings.add(TINY, f"{_named(annotation)} has the bbox {box}")
            return False
        if annotation["area"] <= 0:
            findings.add(NO_SURFACE, f"{_named(annotation)} has the area {annotation['area']} and the bbox {box}")
            return False
        if left + across > width * (1 + EDGE) or top + down > height * (1 + EDGE):
            findings.add(OVER_EDGE, f"{_named(annotation)} has the bbox {box} in a picture of {height} x {width}")
        return not annotation["iscrowd"] and (has_mask or not self.use.masks)

    def _check_mask(self, annotation: dict[str, Any], height: int, width: int) -> bool:
        """Whether there is a mask; where there is none, the object is not learned: it becomes a crowd.

        It is counted, as a box, which pycocotools too takes for the mask of predictions that have none.
        """
        mask = annotation.get("segmentation")
        if isinstance(mask, list) and mask:
            if not all(map(_is_polygon, mask)):
                self.findings.add(MASK, f"{_named(annotation)} has a segmentation that is no list of lists of numbers")
                return False
            sound = [part for part in mask if len(part) >= 6 and len(part) % 2 == 0]
            if len(sound) == len(mask):
                return True
            numbers = next(len(part) for part in mask if part not in sound)
            if not self.use.training and len(mask[0]) > 4:
                return True  # the metric draws what pycocotools can: scores are those of COCO's own tools
            if sound:
                self.findings.add(PART, f"{_named(annotation)} has a polygon of {numbers} numbers beside sound ones")
                annotation["segmentation"] = sound
                return True
            said = f"has a polygon of {numbers} numbers"
        elif isinstance(mask, dict) and mask:
            size, counts, place = mask.get("size"), mask.get("counts"), f"a picture of {height} x {width}"
            runs = _runs(counts)
            if runs is None or any(type(run) is not int or run < 0 for run in runs):
                self.findings.add(MASK, f"{_named(annotation)} has a mask with the counts {repr(counts)[:60]}")
            elif height and (size != [height, width] or any(type(side) is not int for side in size)):
                self.findings.add(MASK, f"{_named(annotation)} has a mask of size {size} in {place}")
            elif height and sum(runs) != height * width:  # pycocotools reads on behind the end
                self.findings.add(MASK, f"{_named(annotation)} has counts of {sum(runs)} pixels in {place}")
            return True
        else:
            said = f"has the segmentation {repr(mask)[:60]}" if "segmentation" in annotation else "has no segmentation"
        self.findings.add(NO_MASK if self.use.training else BOX_FOR_MASK, f"{_named(annotation)} {said}")
        left, top, across, down = annotation["bbox"]
        right, bottom = left + across, top + down
        annotation["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
        if self.use.training:
            annotation["iscrowd"] = 1
        return not self.use.training

    def _number(self, annotations: list[dict[str, Any]]) -> None:
        """pycocotools takes a match with id 0 for none, and keeps the last of equal ids."""
        identities = [one.get("id") for one in annotations]
        odd = next((one for one in annotations if not whole(one.get("id")) or one["id"] == 0), None)
        if odd is not None:
            said = "an annotation has the id 0" if odd.get("id") == 0 else f"an annotation has the id {odd.get('id')!r}"
        elif len(set(identities)) < len(identities):
            said = f"several annotations have the id {Counter(identities).most_common(1)[0][0]}"
        else:
            return
        self.findings.add(ANNOTATION_ID, said)
        for number, one in enumerate(annotations, 1):
            one["id"] = number

    def _weigh(self, objects: int, annotations: int, counts: Counter[str]) -> None:
        """What a few may be, and most may not."""
        found = self.findings.found
        left_out = [what for kind in (OUTSIDE, TINY, NO_SURFACE) for what in found.get(kind, ())]
        if len(left_out) > objects / 2:
            found[NOTHING_LEFT] = [f"{left_out[0]}, and {len(left_out)} of {objects} objects are like that"]
        for kind in (NO_MASK, BOX_FOR_MASK):
            if len(found.get(kind, ())) > objects / 2:
                found[NO_MASKS] = found.pop(kind)
        if len(found.get(OVER_EDGE, ())) <= objects / 3:
            found.pop(OVER_EDGE, None)
        lost = len(found.get(NOT_LISTED, ())) == annotations > 0
        if not self.findings.wrong and (lost or (self.use.training and not sum(counts.values()))):
            self.findings.add(NO_OBJECT, f"{annotations} annotations have no object of the classes in these pictures")


def _named(annotation: dict[str, Any]) -> str:
    return f"annotation {annotation.get('id')!r}"


def _is_polygon(part: Any) -> bool:
    try:
        return isinstance(part, list) and math.isfinite(sum(part))
    except (TypeError, OverflowError):
        return False


def _runs(counts: Any) -> Sequence[Any] | None:
    """The lengths of a mask's runs, of which a text has five bits a character, each from the third on as a difference.

    None where they are neither.
    """
    if isinstance(counts, list):
        return counts
    if not isinstance(counts, str) or any(not 48 <= ord(letter) < 112 for letter in counts):
        return None
    runs: list[int] = []
    value = shift = 0
    for letter in counts:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs if not shift else None


def _area(annotation: dict[str, Any], height: int, width: int) -> float:
    """Of the mask in pixels, as COCO counts; without one that can be drawn, of the box."""
    from pycocotools import mask as masks

    mask = annotation.get("segmentation")
    try:
        if isinstance(mask, list):
            polygons = [part for part in mask if len(part) >= 6]
            mask = masks.merge(masks.frPyObjects(polygons, height, width))
        elif isinstance(mask["counts"], list):
            mask = masks.frPyObjects(mask, height, width)
        return float(masks.area(mask))
    except Exception:  # of any type: pycocotools has no word of its own for what is no mask
        return float(annotation["bbox"][2] * annotation["bbox"][3])
