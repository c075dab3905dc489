"""What is said about published weights by those who publish them: where they lie and how images are to be prepared."""

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
    layout: str  # "timm", "torchvision", "official" or "mmaction2"
    source: str  # "hf-hub:org/name" or a URL
    filename: str | None  # in the repository, where it is not one of the usual names
    num_classes: int
    input_size: tuple[int, int, int]  # channels, height, width
    mean: tuple[float, ...]  # of pixels in [0, 1]
    std: tuple[float, ...]
    crop_pct: float  # side of the centre crop over the shorter side of the resized image
    interpolation: str  # "bicubic", "bilinear", ...
    license: str | None


OFFICIAL_VIDEO = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4/{}.pth"
MMACTION2 = "https://download.openmmlab.com/mmaction/v1.0/recognition/swin/{0}/{0}_{1}.pth"
# our short name -> configuration, and date with the beginning of the file's SHA-256
MMACTION2_FILES = {
    "swin-tiny_in1k_kinetics400": (
        "swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb",
        "20220930-241016b2",
    ),
    "swin-small_in1k_kinetics400": (
        "swin-small-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb",
        "20220930-e91ab986",
    ),
    "swin-base_in1k_kinetics400": (
        "swin-base-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb",
        "20220930-182ec6cc",
    ),
    "swin-large_in22k_kinetics400": (
        "swin-large-p244-w877_in22k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb",
        "20220930-78ad8b11",
    ),
    "swin-large_in22k_kinetics700": (
        "swin-large-p244-w877_in22k-pre_16xb8-amp-32x2x1-30e_kinetics700-rgb",
        "20220930-f8d74db7",
    ),
}
VIDEO_CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "sthv2": 174}


def official_weights(name: str) -> PublishedWeights:
    """The file of this name among the releases of SwinTransformer/Video-Swin-Transformer."""
    return _video_weights(name, "official", OFFICIAL_VIDEO.format(name))


def mmaction2_weights(name: str) -> PublishedWeights:
    """A file of `MMACTION2_FILES`."""
    return _video_weights(name, "mmaction2", MMACTION2.format(*MMACTION2_FILES[name]))


def _video_weights(name: str, layout: str, url: str) -> PublishedWeights:
    """Both code bases prepare frames alike: the shorter side to 256 pixels, bilinear; ImageNet's mean and deviation."""
    return PublishedWeights(
        name=name,
        layout=layout,
        source=url,
        filename=None,
        num_classes=next(count for data, count in VIDEO_CLASSES.items() if data in name),
        input_size=(3, 224, 224),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_pct=224 / 256,
        interpolation="bilinear",
        license="apache-2.0",  # of either repository
    )


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


# what stands before the colon in `Variant.weights`
LIBRARIES = {
    "timm": timm_weights,
    "torchvision": torchvision_weights,
    "official": official_weights,
    "mmaction2": mmaction2_weights,
}


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {', '.join(nearest)}?" if nearest else ": check the name"
