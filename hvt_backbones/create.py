"""Build a model by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from .backbone import Backbone
from .classifier import Classifier
from .errors import InputError
from .variants import Variant, find_variant, list_models

__all__ = ["backbone_class", "create_backbone", "create_classifier", "list_models"]

FAMILY_CLASSES = {
    "swin": ("swin", "SwinTransformer"),
    "swinv2": ("swin", "SwinTransformerV2"),
    "pvt_v2": ("pvt_v2", "PyramidVisionTransformerV2"),
    "twins_pcpvt": ("twins", "TwinsPCPVT"),
    "twins_svt": ("twins", "TwinsSVT"),
}
ALL_STAGES = (0, 1, 2, 3)


def backbone_class(family: str) -> type[Backbone]:
    module, name = FAMILY_CLASSES[family]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def create_backbone(
    name: str, *, pretrained: bool | str = False, out_indices: Sequence[int] = ALL_STAGES, **overrides: Any
) -> Backbone:
    """A backbone for dense prediction, as the official detection code builds it.

    Args:
        name: a name of `list_models()`, or one of timm's, torchvision's or the papers'.
        pretrained: True for the first weights of the model, a tag ("in1k", "in22k", "in22k_ft_in1k"), a path or a URL.
        out_indices: stages to return, from 0. Only the stages up to the last one are built. The default means
            every stage, also where `depths` names fewer than four.
        **overrides: constructor arguments of the family's class, such as `in_chans`, `window_size`,
            `drop_path_rate`. Where `depths` has fewer stages than the model, the other per-stage arguments are cut.

    Raises:
        InputError: an unknown model or argument, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    variant, tag = find_variant(name)
    arguments = _arguments(variant, overrides)
    stages = _num_stages(arguments)
    if tuple(out_indices) == ALL_STAGES:
        out_indices = range(min(stages, len(ALL_STAGES)))
    arguments["out_indices"] = _checked_indices(out_indices, stages)
    if variant.family == "twins_pcpvt":
        arguments.setdefault("norm_after_stage", ())
    elif variant.family == "twins_svt":
        arguments.setdefault("norm_after_stage", tuple(range(stages)))
    model = backbone_class(variant.family)(**arguments)
    _load(model, variant, tag, pretrained)
    return model


def create_classifier(
    name: str, *, num_classes: int = 1000, pretrained: bool | str = False, **overrides: Any
) -> Classifier:
    """An image classifier, as the official classification code builds it.

    Args:
        name: as in `create_backbone`.
        num_classes: width of the output; 0 gives pooled features. Pretrained weights for other classes load without
            their head.
        pretrained: as in `create_backbone`.
        **overrides: as in `create_backbone`, without `out_indices`.

    Raises:
        InputError: an unknown model or argument, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    variant, tag = find_variant(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
        raise InputError(f"num_classes must be a whole number from 0, got {num_classes!r}")
    arguments = _arguments(variant, overrides)
    last = _num_stages(arguments) - 1
    if variant.family in ("swin", "swinv2"):
        arguments.setdefault("small_map", "shrink")
    elif variant.family in ("twins_pcpvt", "twins_svt"):
        arguments.setdefault("norm_after_stage", (last,))
    model = Classifier(backbone_class(variant.family)(**arguments, out_indices=(last,)), num_classes)
    _load(model, variant, tag, pretrained)
    return model


def _arguments(variant: Variant, overrides: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments: those of the row, cut to the number of stages, then the user's."""
    accepted = set(inspect.signature(backbone_class(variant.family)).parameters) - {"out_indices"}
    for argument in overrides:
        if argument not in accepted:
            near = difflib.get_close_matches(argument, accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"{variant.name} has no argument {argument!r}: {hint}it takes {', '.join(sorted(accepted))}"
            )
    stages = _num_stages({**variant.arch, **overrides})
    if stages > len(variant.arch["depths"]):
        missing = [key for key, value in variant.arch.items() if isinstance(value, tuple) and key not in overrides]
        if missing:
            raise InputError(
                f"depths has {stages} stages, {variant.name} has {len(variant.arch['depths'])}: "
                f"give {', '.join(missing)} for {stages} stages too"
            )
    rows = {key: value[:stages] if isinstance(value, tuple) else value for key, value in variant.arch.items()}
    return {**rows, **overrides}


def _num_stages(arguments: dict[str, Any]) -> int:
    depths = arguments["depths"]
    whole = isinstance(depths, Iterable) and not isinstance(depths, str)
    if not whole or not depths or not all(isinstance(depth, int) and depth > 0 for depth in depths):
        raise InputError(f"depths must be positive whole numbers, one per stage, such as (2, 2, 6, 2); got {depths!r}")
    return len(depths)


def _checked_indices(out_indices: Sequence[int], stages: int) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or list(indices) != sorted(set(indices)) or not all(i in range(stages) for i in indices):
        raise InputError(f"out_indices must be rising stage numbers from 0 to {stages - 1}, got {indices}")
    return indices


def _load(model: Backbone | Classifier, variant: Variant, tag: str | None, pretrained: bool | str) -> None:
    if pretrained is False or pretrained is None:
        return
    from .weights import load_weights

    if pretrained is True:
        source = variant.source(tag)
    else:
        source = variant.weights.get(str(pretrained), pretrained)
    load_weights(model, source)
