"""The parts of a configuration and of its model: found, completed, and compared before PyTorch would.

A configuration may leave out the channels that a part takes, which are those of the backbone and the neck, and classes,
which are those of the data.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from hvt_backbones.errors import InputError
from hvt_backbones.openmmlab import HVTBackbone
from hvt_backbones.weights.report import some

PARTS = ("train", "val", "test")
PROPOSALS = "rpn_head"  # knows no classes
DENSE_HEADS = ("decode_head", "auxiliary_head")
HEADS = (PROPOSALS, "bbox_head", "cls_head", *DENSE_HEADS)
REGION_HEADS = ("bbox_head", "mask_head")


def datasets_of(config: Any) -> Iterator[Any]:
    """The data sets themselves, out of what repeats or concatenates them."""
    if isinstance(config, Mapping):
        inner = [config[key] for key in ("dataset", "datasets") if key in config]
        if not inner:
            yield config
        for one in inner:
            yield from datasets_of(one)
    elif isinstance(config, list | tuple):
        for one in config:
            yield from datasets_of(one)


def data_of(cfg: Mapping[str, Any], part: str) -> Iterator[Any]:
    """The data sets of "train", "val" or "test"; none where the configuration leaves it out."""
    return datasets_of((cfg.get(f"{part}_dataloader") or {}).get("dataset"))


def evaluators_of(cfg: Mapping[str, Any], part: str) -> list[Any]:
    """Those of "val" or "test"."""
    evaluators = cfg.get(f"{part}_evaluator") or ()
    return [evaluators] if isinstance(evaluators, Mapping) else list(evaluators)


def type_name(config: Mapping[str, Any]) -> str:
    """Of what a configuration builds, which may be named with its scope, or be the class."""
    kind = config.get("type", "")
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


# ---- what a configuration leaves out ----


def complete(cfg: Config) -> None:
    """Fill in `in_channels` of necks and heads, `out_channels` of what cuts regions out, and `num_classes`, in place.

    What the configuration says stays as it is, for `check_parts` and `check_classes` to compare. Models whose backbone
    is not ours are left alone.
    """
    backbone = cfg.model.get("backbone")
    if not isinstance(backbone, Mapping) or type_name(backbone) != HVTBackbone.__name__:
        return
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        _complete_channels(cfg.model)
        _complete_classes(cfg)


def _complete_channels(model: Any) -> None:
    necks = model.get("neck") or ()
    necks = [necks] if isinstance(necks, Mapping) else necks
    roi_head = model.get("roi_head") or {}
    extractors = list(_listed(roi_head, ("bbox_roi_extractor", "mask_roi_extractor")))
    heads = list(_listed(model, (*HEADS, "mask_head")))
    regions = list(_listed(roi_head, REGION_HEADS))
    said = ["in_channels" in part for part in (*necks[:1], *(head for _, head in (*heads, *regions)))]
    if all(said) and all("out_channels" in extractor for _, extractor in extractors):
        return
    given = _channels(model.backbone)
    for neck in necks[:1]:
        _fill(neck, "in_channels", list(given))
    if necks:
        last = necks[-1]
        if not isinstance(last.get("out_channels"), int) or not isinstance(last.get("num_outs"), int):
            return
        given = (last["out_channels"],) * last["num_outs"]
    for _, extractor in extractors:
        _fill(extractor, "out_channels", given[0])
    for name, head in heads:
        if name in DENSE_HEADS:
            index = head.get("in_index", -1)
            chosen = choose_maps(given, index, name, "the neck" if necks else f"the backbone {model.backbone.name}")
            maps = chosen[0] if isinstance(index, int) else list(chosen)
        else:
            maps = given[-1] if name == "cls_head" else given[0]
        _fill(head, "in_channels", maps)
    for _, head in regions:
        _fill(head, "in_channels", extractors[0][1].get("out_channels", given[0]) if extractors else given[0])


def _complete_classes(cfg: Config) -> None:
    model = cfg.model
    parts = [*_listed(model, (*HEADS, "mask_head")), *_listed(model.get("roi_head") or {}, REGION_HEADS)]
    heads = [head for name, head in parts if name != PROPOSALS and "num_classes" not in head]
    dataset = next((one for part in PARTS for one in data_of(cfg, part)), None)
    if not heads or dataset is None:
        return
    if classes := DATASETS.build({**dataset, "lazy_init": True, "pipeline": []}).metainfo.get("classes"):
        for head in heads:
            _fill(head, "num_classes", len(classes))


def _channels(backbone: Any) -> tuple[int, ...]:
    with torch.device("meta"):
        return MODELS.build({**backbone, "pretrained": False, "weights_key": None, "init_cfg": None}).channels


def _listed(owner: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Those that are there, of a list each."""
    for name in names:
        part = owner.get(name)
        for one in [part] if isinstance(part, Mapping) else part or ():
            yield name, one


def _fill(part: Any, key: str, value: Any) -> None:
    """Where the part's class takes it and the configuration does not say it."""
    kind = part.get("type")
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(None) as models:  # of the framework
            kind = models.get(kind)
    above = [vars(base)["__init__"] for base in getattr(kind, "__mro__", ()) if "__init__" in vars(base)]
    if key not in part and any(key in inspect.signature(one).parameters for one in above if callable(one)):
        part[key] = value


# ---- whether what it says fits ----


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
