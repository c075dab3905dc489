"""Whether the parts of a model fit together, said before the first step in which PyTorch would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from hvt_backbones.errors import InputError
from hvt_backbones.openmmlab import HVTBackbone
from hvt_backbones.weights.report import some

PROPOSALS = "rpn_head"  # knows no classes
HEADS = (PROPOSALS, "bbox_head", "cls_head", "decode_head", "auxiliary_head")
REGION_HEADS = ("bbox_head", "mask_head")


def check_parts(model: nn.Module) -> None:
    """Compare the channels of our backbone's maps with what the neck or the heads take, and the neck's with the heads'.

    Parts that do not say what they take are left to PyTorch.

    Raises:
        InputError: they differ.
    """
    model = getattr(model, "module", model)  # of test-time augmentation
    backbone, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if not isinstance(backbone, HVTBackbone):
        return
    given, giver = backbone.channels, f"the backbone {backbone.name}"
    cause = "set it to these, or change model.backbone.out_indices"
    if neck is not None:
        _compare("neck", getattr(neck, "in_channels", None), given, giver, cause)
        first = getattr(neck, "start_level", None)
        if isinstance(first, int) and not 0 <= first < len(given):
            raise InputError(
                f"model.neck.start_level is {first}, {giver} gives {len(given)} maps, 0 to {len(given) - 1}: choose "
                "among these"
            )
        count, channels = getattr(neck, "num_outs", None), getattr(neck, "out_channels", None)
        if not isinstance(count, int) or not isinstance(channels, int):
            return
        given, giver, cause = (channels,) * count, "the neck", "set it to these, or change model.neck.out_channels"
    for name, head in _numbered(model, HEADS):
        maps, of = given, giver
        if isinstance(index := getattr(head, "in_index", None), int | Sequence):
            maps, of = choose_maps(given, index, name, giver), f"{giver}, of which it takes {index},"
            if head.input_transform == "resize_concat":
                maps = (sum(maps),)
        _compare(name, getattr(head, "in_channels", None), maps, of, cause)
    roi_head = getattr(model, "roi_head", None)
    if roi_head is not None and not getattr(roi_head, "with_shared_head", False):
        _check_roi_head(roi_head, given, giver)


def choose_maps(given: tuple[int, ...], index: int | Sequence[int], name: str, giver: str) -> tuple[int, ...]:
    """The channels of the maps that the head `name` takes by its `in_index`, of those that `giver` gives.

    Raises:
        InputError: there is no such map.
    """
    chosen = [index] if isinstance(index, int) else list(index)
    if any(not -len(given) <= number < len(given) for number in chosen):
        raise InputError(
            f"model.{name}.in_index is {index}, {giver} gives {len(given)} maps, 0 to {len(given) - 1}: choose among "
            "these"
        )
    return tuple(given[number] for number in chosen)


def _check_roi_head(roi_head: nn.Module, given: tuple[int, ...], giver: str) -> None:
    """The second stage of a detector, of one round or several: what cuts regions out of the maps, and its heads."""
    for kind in ("bbox", "mask"):
        # those of mmdetection; others are left to PyTorch
        extractors = [pair for pair in _numbered(roi_head, [f"{kind}_roi_extractor"]) if hasattr(pair[1], "roi_layers")]
        for name, extractor in extractors:
            maps = given[: extractor.num_inputs]
            if getattr(extractor, "aggregation", None) == "concat":
                maps = (sum(maps),)
            _compare(f"roi_head.{name}", extractor.out_channels, maps, giver, "set it to these", key="out_channels")
        heads = _numbered(roi_head, [f"{kind}_head"])
        for (source, extractor), (name, head) in zip(extractors, heads, strict=False):
            cut, of = extractor.out_channels, f"model.roi_head.{source}"
            _compare(f"roi_head.{name}", getattr(head, "in_channels", None), (cut,), of, f"set it to {cut}")
            size = extractor.roi_layers[0].output_size
            if hasattr(head, "shared_fcs") and not head.with_avg_pool and head.roi_feat_size != size:
                raise InputError(
                    f"model.roi_head.{name}.roi_feat_size is {head.roi_feat_size}, {of} gives regions of {size}: set "
                    "it to this, or change the output_size of its roi_layer"
                )


def check_classes(model: nn.Module, metainfo: Mapping[str, Any], data: str) -> None:
    """Compare the classes of the heads with those of the data, where both are known and the backbone is ours.

    Args:
        model: a detector, segmentor or recognizer.
        metainfo: of a data set of MMEngine.
        data: what it is for, for messages: "training", "validation" or "test".

    Raises:
        InputError: the numbers differ.
    """
    for _ in range(2):  # of several processes, and of test-time augmentation
        model = getattr(model, "module", model)
    classes = metainfo.get("classes") or ()
    if not classes or not isinstance(getattr(model, "backbone", None), HVTBackbone):
        return
    heads = list(_numbered(model, [name for name in HEADS if name != PROPOSALS]))
    regions = _numbered(getattr(model, "roi_head", None), REGION_HEADS)
    heads += [(f"roi_head.{name}", head) for name, head in regions]
    for name, head in heads:
        count = None if getattr(head, "class_agnostic", False) else getattr(head, "num_classes", None)
        if isinstance(count, int) and count != len(classes):
            named = (
                f"the class {classes[0]}" if len(classes) == 1 else f"{len(classes)} classes ({some(list(classes))})"
            )
            raise InputError(
                f"model.{name}.num_classes is {count}, the {data} data has {named}: set it to {len(classes)}, or name "
                "other classes by the data set's metainfo.classes"
            )


def _numbered(module: nn.Module | None, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Those parts that are there, of a list each."""
    for name in names:
        part = getattr(module, name, None)
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}[{index}]", one) for index, one in enumerate(part))
        elif part is not None:
            yield name, part


def _compare(
    name: str, wanted: Any, given: tuple[int, ...], giver: str, cause: str, *, key: str = "in_channels"
) -> None:
    """One number stands for every map."""
    if wanted is None or (tuple(wanted) == given if isinstance(wanted, Sequence) else {wanted} == set(given)):
        return
    channels = ", ".join(map(str, given))
    raise InputError(f"model.{name}.{key} is {wanted}, {giver} gives maps of {channels} channels: {cause}")
