"""Build a model by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .backbone import Backbone, is_whole
from .classifier import Classifier
from .errors import InputError, nearest
from .pvt_v2 import PyramidVisionTransformerV2
from .simmim import FAMILIES, SimMIM
from .swin import SwinTransformer, SwinTransformerV2
from .twins import TwinsPCPVT, TwinsSVT
from .variants import ModelName, Variant, find_variant, list_models
from .video_swin import VideoSwinTransformer

__all__ = ["create_backbone", "create_classifier", "create_simmim", "list_models"]

FAMILY_CLASSES: dict[str, type[Backbone]] = {
    cls.family: cls
    for cls in (
        SwinTransformer,
        SwinTransformerV2,
        PyramidVisionTransformerV2,
        TwinsPCPVT,
        TwinsSVT,
        VideoSwinTransformer,
    )
}
logger = logging.getLogger(__name__)


def create_backbone(
    name: ModelName | str,
    *,
    pretrained: bool | str | Path = False,
    weights_key: str | None = None,
    out_indices: Sequence[int] | None = None,
    **overrides: Any,
) -> Backbone:
    """A backbone for dense prediction, as the official detection code builds it.

    Args:
        name: a name of `list_models()`, or one of timm's, torchvision's or the papers'.
        pretrained: True for the first weights of the model, a tag ("in1k", "in22k", "in22k_ft_in1k"), a path or a URL;
            for a video model also the name of an image model to inflate ("swin_tiny", "swin_base.in22k").
        weights_key: which of several sets of weights in the file, such as "state_dict_ema"; see `load_weights`.
        out_indices: stages to return, from 0; by default all. Only the stages up to the last one are built.
        **overrides: constructor arguments of the family's class, such as `in_chans`, `window_size`,
            `drop_path_rate`. Where `depths` has fewer stages than the model, the other per-stage arguments are cut.

    Raises:
        InputError: an unknown model or argument, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    variant, tag = find_variant(name)
    arguments = _arguments(variant, overrides)
    stages = _num_stages(arguments)
    if out_indices is not None and not isinstance(out_indices, Sequence):
        raise InputError(f"out_indices must be a tuple of stage numbers, such as (0, 1, 2, 3); got {out_indices!r}")
    arguments["out_indices"] = tuple(range(stages)) if out_indices is None else tuple(out_indices)
    model = FAMILY_CLASSES[variant.family](**arguments)
    _load(model, variant, tag, pretrained, weights_key=weights_key)
    return model


def create_classifier(
    name: ModelName | str,
    *,
    num_classes: int | None = None,
    pretrained: bool | str | Path = False,
    weights_key: str | None = None,
    class_map: Sequence[int] | str | Path | None = None,
    **overrides: Any,
) -> Classifier:
    """An image classifier, as the official classification code builds it.

    Args:
        name: as in `create_backbone`.
        num_classes: width of the output; 0 gives pooled features. By default 1000, of a video model the classes of
            the weights' data set, 400 without. Pretrained weights for other classes load without their head.
        pretrained, weights_key: as in `create_backbone`.
        class_map: which rows of the pretrained head the classes take, as in `load_weights`: from 22K to 1K.
        **overrides: as in `create_backbone`, without `out_indices`.

    Raises:
        InputError: an unknown model or argument, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    variant, tag = find_variant(name)
    if num_classes is None:
        wanted = tag if pretrained is True else pretrained
        num_classes = 1000 if variant.frames is None else _video_classes(variant, wanted)
    model = Classifier(_with_last_map(variant, overrides), num_classes)
    _load(model, variant, tag, pretrained, class_map=class_map, weights_key=weights_key)
    return model


def create_simmim(
    name: ModelName | str,
    *,
    norm_target: int | None = None,
    pretrained: bool | str | Path = False,
    weights_key: str | None = None,
    **overrides: Any,
) -> SimMIM:
    """Masked image modelling over a Swin or SwinV2, as the official pre-training code builds it.

    Args:
        name: as in `create_backbone`.
        norm_target: see `SimMIM`.
        pretrained, weights_key: as in `create_backbone`; weights of a classifier load without mask token and decoder.
        **overrides: as in `create_backbone`, without `out_indices`.

    Raises:
        InputError: an unknown model or argument, a model of another family, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    variant, tag = find_variant(name)
    if variant.family not in FAMILIES:
        raise InputError(f"SimMIM is for Swin and SwinV2, and {variant.name} is of the family {variant.family}")
    backbone = _with_last_map(variant, overrides)
    assert isinstance(backbone, SwinTransformer)
    model = SimMIM(backbone, norm_target=norm_target)
    _load(model, variant, tag, pretrained, weights_key=weights_key)
    return model


def _with_last_map(variant: Variant, overrides: dict[str, Any]) -> Backbone:
    """The backbone as the official classifier has it."""
    arguments = _arguments(variant, overrides)
    last = _num_stages(arguments) - 1
    family = FAMILY_CLASSES[variant.family]
    return family(**{**family.classifier_arguments(last + 1), **arguments}, out_indices=(last,))


def _video_classes(variant: Variant, tag: Any) -> int:
    """Of the data set that the weights of this tag are for; of Kinetics-400 where it is none."""
    if tag in (None, *variant.tags):
        return variant.published(tag).num_classes
    return 400


def _arguments(variant: Variant, overrides: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments: those of the row, cut to the number of stages, then the user's."""
    accepted = FAMILY_CLASSES[variant.family].arguments() - {"out_indices"}
    for argument in overrides:
        if argument not in accepted:
            hint = nearest(argument, sorted(accepted), most=1, cutoff=0.6, otherwise="")
            takes = f"{hint} it takes {', '.join(sorted(accepted))}".lstrip()
            raise InputError(f"{variant.name} has no argument {argument!r}: {takes}")
    stages = _num_stages({**variant.arch, **overrides})
    if stages > len(variant.arch["depths"]):
        missing = [key for key, value in variant.arch.items() if isinstance(value, tuple) and key not in overrides]
        if missing:
            raise InputError(
                f"depths has {stages} stages, {variant.name} has {len(variant.arch['depths'])}: "
                f"give {', '.join(missing)} for {stages} stages too"
            )
    return variant.with_overrides(overrides)


def _num_stages(arguments: dict[str, Any]) -> int:
    depths = arguments["depths"]
    whole = isinstance(depths, Sequence) and not isinstance(depths, str)
    if not whole or not depths or not all(map(is_whole, depths)):
        raise InputError(f"depths must be positive whole numbers, one per stage, such as (2, 2, 6, 2); got {depths!r}")
    return len(depths)


def _load(
    model: Backbone | Classifier | SimMIM,
    variant: Variant,
    tag: str | None,
    pretrained: bool | str | Path,
    **choices: Any,
) -> None:
    if pretrained is False or pretrained is None:
        if given := [name for name, value in choices.items() if value is not None]:
            raise InputError(f"{given[0]} is about pretrained weights: give `pretrained` too")
        return
    if pretrained is not True and not isinstance(pretrained, str | Path):
        raise InputError(f"pretrained is {pretrained!r}: give True, False, a weight tag, a path or a URL")
    from .weights.load import load_pretrained

    report = load_pretrained(model, variant, tag, pretrained, **choices)
    logger.info("%s: %s", variant.name, report)
    if isinstance(model, Classifier) and any(key.startswith("head.") for key in report.initialised):
        # right for fine-tuning, wrong for classification: so it is said
        logger.warning("%s: the weights have no head for %d classes, so it is new", variant.name, model.num_classes)
