"""What timm and torchvision say about the weights they publish: where they lie and how images are to be prepared."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from hvt_backbones.errors import WeightsError
from hvt_backbones.weights.fetch import HUB_PREFIX


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One set of published weights; `fetch(weights.source, filename=weights.filename)` brings the file."""

    name: str
    layout: str  # "timm" or "torchvision"
    source: str  # "hf-hub:org/name" or a URL
    filename: str | None  # in the repository, where it is not one of the usual names
    num_classes: int
    input_size: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # of pixels in [0, 1]
    std: tuple[float, ...]
    crop_pct: float  # side of the centre crop over the shorter side of the resized image
    interpolation: str  # "bicubic", "bilinear", ...
    license: str | None


def timm_weights(name: str) -> PublishedWeights:
    """Look up a pretrained name of timm, with or without its tag ("swin_tiny_patch4_window7_224.ms_in1k").

    Raises:
        WeightsError: timm does not know the name, or publishes no weights under it.
    """
    from timm.models import get_pretrained_cfg, list_pretrained

    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError:  # a known model with an unknown tag
        cfg = None
    if cfg is None:
        raise WeightsError(f"timm has no weights named {name!r}{_nearest(name, list_pretrained())}")
    if not (cfg.hf_hub_id or cfg.url):
        raise WeightsError(f"timm publishes no weights for {name!r}: pass a path or a URL")
    return PublishedWeights(
        name=name,
        layout="timm",
        source=HUB_PREFIX + cfg.hf_hub_id if cfg.hf_hub_id else cfg.url,
        filename=cfg.hf_hub_filename if cfg.hf_hub_id else None,
        num_classes=cfg.num_classes,
        input_size=tuple(cfg.input_size),
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        crop_pct=cfg.crop_pct,
        interpolation=cfg.interpolation,
        license=cfg.license,
    )


def torchvision_weights(name: str) -> PublishedWeights:
    """Look up torchvision's weights: a model ("swin_t", its default weights) or "Swin_T_Weights.IMAGENET1K_V1".

    Raises:
        WeightsError: torchvision does not know the name.
    """
    from torchvision.models import get_model_weights, get_weight, list_models

    try:
        weights = get_weight(name) if "." in name else get_model_weights(name).DEFAULT
    except (ValueError, KeyError) as error:
        raise WeightsError(f"torchvision has no weights named {name!r}{_nearest(name, list_models())}") from error
    transforms = weights.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return PublishedWeights(
        name=str(weights),
        layout="torchvision",
        source=weights.url,
        filename=None,
        num_classes=len(weights.meta["categories"]),
        input_size=(len(transforms.mean), crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_pct=crop / resize,
        interpolation=transforms.interpolation.value,
        license=None,  # torchvision states none for weights
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {', '.join(nearest)}?" if nearest else ": check the name"
