"""Channels and classes that a configuration leaves out: of the backbone, and of the data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope

from . import patches
from .application import Application
from .config import building, read_config
from .data import datasets_of
from .parts import choose_maps

BACKBONE = "HVTBackbone"
DENSE_HEADS = ("decode_head", "auxiliary_head")
HEADS = ("rpn_head", "bbox_head", "mask_head", "cls_head", *DENSE_HEADS)
PROPOSALS = "rpn_head"  # knows no classes


def open_config(name: str, options: Mapping[str, Any] | None, application: Application) -> Config:
    """`read_config` of a file, whose bases may be names too, or of a name; completed.

    Raises:
        InputError: as `read_config`.
    """
    with patches.named_bases(application.zoo.config):
        cfg = read_config(name, options, application)
    with building(name):
        complete(cfg)
    return cfg


def complete(cfg: Config) -> None:
    """Fill in `in_channels` of necks and heads, `out_channels` of what cuts regions out, and `num_classes`, in place.

    What the configuration says stays as it is, and is compared with the model's by `parts`. Models whose backbone is
    not ours are left alone.
    """
    model, backbone = cfg.model, cfg.model.get("backbone")
    if not isinstance(backbone, Mapping) or str(backbone.get("type")).rpartition(".")[2] != BACKBONE:
        return
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        _complete_channels(model)
        _complete_classes(cfg)


def _complete_channels(model: Any) -> None:
    necks = model.get("neck") or ()
    necks = [necks] if isinstance(necks, Mapping) else necks
    heads, roi_head = list(_parts(model, HEADS)), model.get("roi_head") or {}
    extractors = list(_parts(roi_head, ("bbox_roi_extractor", "mask_roi_extractor")))
    regions = list(_parts(roi_head, HEADS))
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
        _fill(head, "in_channels", extractors[0][1]["out_channels"] if extractors else given[0])


def _complete_classes(cfg: Config) -> None:
    parts = [*_parts(cfg.model, HEADS), *_parts(cfg.model.get("roi_head") or {}, HEADS)]
    heads = [head for name, head in parts if name != PROPOSALS and "num_classes" not in head]
    loaders = [cfg.get(f"{part}_dataloader") for part in ("train", "val", "test")]
    dataset = next((one for loader in loaders if loader for one in datasets_of(loader["dataset"])), None)
    if not heads or dataset is None:
        return
    if classes := DATASETS.build({**dataset, "lazy_init": True, "pipeline": []}).metainfo.get("classes"):
        for head in heads:
            _fill(head, "num_classes", len(classes))


def _channels(backbone: Any) -> tuple[int, ...]:
    with torch.device("meta"):
        return MODELS.build({**backbone, "pretrained": False, "init_cfg": None}).channels


def _parts(owner: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
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
