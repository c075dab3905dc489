"""What is said about published weights by those who publish them: where they lie and how images are to be prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import WeightsError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

HUB_PREFIX = "hf-hub:"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the model's input, in timm's words.

    Attributes:
        input_size: (channels, height, width).
        mean, std: of the channels, for values from 0 to 1.
        interpolation: "bicubic", "bilinear", ...
        crop_pct: side of the centre crop over the side of the resized picture.
        crop_mode: "center" keeps the picture's proportions; "squash" resizes all of it to `input_size`.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"

    def transform(self, *, normalize: bool = True) -> Callable[[Image], Tensor]:
        """A function from a picture to a (C, H, W) tensor: float32, or the bytes that are yet to be normalised."""
        from timm.data import create_transform

        return create_transform(**asdict(self), is_training=False, normalize=normalize)


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One set of published weights; `fetch(weights.source, filename=weights.filename)` brings the file."""

    source: str  # "hf-hub:org/name" or a URL
    filename: str | None  # in the repository, where it is not one of the usual names
    num_classes: int
    preprocessing: Preprocessing
    license: str | None


OFFICIAL_VIDEO = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4/{}.pth"
MMACTION2 = "https://download.openmmlab.com/mmaction/v1.0/recognition/swin/{0}/{0}_{1}.pth"
MMACTION2_CONFIG = "{model}-p244-w877_{before}-pre_{batches}-amp-32x2x1-30e_{data}-rgb"
# model, what it was trained on before, data set -> GPUs and batch, date with the beginning of the file's SHA-256
MMACTION2_FILES = {
    "swin-tiny_in1k_kinetics400": ("8xb8", "20220930-241016b2"),
    "swin-small_in1k_kinetics400": ("8xb8", "20220930-e91ab986"),
    "swin-base_in1k_kinetics400": ("8xb8", "20220930-182ec6cc"),
    "swin-large_in22k_kinetics400": ("8xb8", "20220930-78ad8b11"),
    "swin-large_in22k_kinetics700": ("16xb8", "20220930-f8d74db7"),
}
VIDEO_CLASSES = {"kinetics400": 400, "kinetics600": 600, "kinetics700": 700, "sthv2": 174}


def official_weights(name: str) -> PublishedWeights:
    """The file of this name among the releases of SwinTransformer/Video-Swin-Transformer."""
    return _video_weights(name, OFFICIAL_VIDEO.format(name))


def mmaction2_weights(name: str) -> PublishedWeights:
    """A file of `MMACTION2_FILES`."""
    (model, before, data), (batches, version) = name.split("_"), MMACTION2_FILES[name]
    config = MMACTION2_CONFIG.format(model=model, before=before, batches=batches, data=data)
    return _video_weights(name, MMACTION2.format(config, version))


def _video_weights(name: str, url: str) -> PublishedWeights:
    """Both code bases prepare frames alike: the shorter side to 256 pixels, bilinear; ImageNet's mean and deviation."""
    return PublishedWeights(
        source=url,
        filename=None,
        num_classes=next(count for data, count in VIDEO_CLASSES.items() if data in name),
        preprocessing=Preprocessing(crop_pct=224 / 256, interpolation="bilinear"),
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
        raise WeightsError(f"timm has no weights named {name!r}: {nearest(name, list_pretrained())}")
    source = HUB_PREFIX + cfg.hf_hub_id if cfg.hf_hub_id else cfg.url
    if not isinstance(source, str):
        raise WeightsError(f"timm publishes no weights for {name!r}: pass a path or a URL")
    channels, height, width = cfg.input_size
    return PublishedWeights(
        source=source,
        filename=cfg.hf_hub_filename if cfg.hf_hub_id else None,
        num_classes=cfg.num_classes,
        preprocessing=Preprocessing(
            input_size=(channels, height, width),
            mean=tuple(cfg.mean),
            std=tuple(cfg.std),
            crop_pct=cfg.crop_pct,
            interpolation=cfg.interpolation,
        ),
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
        raise WeightsError(f"torchvision has no weights named {name!r}: {nearest(name, list_models())}") from error
    transforms = weights.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return PublishedWeights(
        source=weights.url,
        filename=None,
        num_classes=len(weights.meta["categories"]),
        preprocessing=Preprocessing(
            input_size=(len(transforms.mean), crop, crop),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            crop_pct=crop / resize,
            interpolation=transforms.interpolation.value,
        ),
        license=None,  # torchvision states none for weights
    )


# what stands before the colon in `Variant.weights`
LIBRARIES = {
    "timm": timm_weights,
    "torchvision": torchvision_weights,
    "official": official_weights,
    "mmaction2": mmaction2_weights,
}
