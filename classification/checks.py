"""Settings against what lies outside the recipe: the models, the installed packages, the files.

Nothing here touches a device: the model is built and run on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvt_backbones import Classifier, InputError, SimMIM, create_classifier, create_simmim
from hvt_backbones.errors import nearest
from hvt_backbones.model_file import image_variant
from hvt_backbones.simmim import FAMILIES
from hvt_backbones.variants import find_variant
from hvt_backbones.weights.sources import is_file_or_url

from .config import Config, DataConfig, ModelConfig, OptimizerConfig, SimmimConfig

# timm reads such texts leniently and leaves out what it does not understand
POLICY = re.compile(
    r"rand(-(m\d{1,2}|n\d|p(0\.\d+|[01])|mstd\d+(\.\d+)?|mmax\d{1,2}|inc[01]|tweights))*"
    r"|augmix(-(m\d{1,2}|w\d|d\d|b[01]|a\d+(\.\d+)?|mstd\d+(\.\d+)?))*"
    r"|(v0|v0r|original|originalr|3a)(-mstd\d+(\.\d+)?)?"
)
# arguments of `create_classifier` that are no overrides
SAID_ELSEWHERE = {"name": "model.name", "pretrained": "model.pretrained", "class_map": "model.class_map",
                  "num_classes": "the data"}  # fmt: skip
LARGEST_NUMBER, LARGEST_DEPTH, LARGEST_MODEL = 100_000, 1000, 20e9  # SwinV2-G, the largest published, has 3e9


def check_names(config: Config) -> None:
    """What other code must know: packages, augmentation policy, optimiser, model, its arguments and its pictures.

    Raises:
        InputError: a name or value that it does not know or that does not fit, as one line that names the key.
    """
    _check_packages(config)
    policy = config.augmentation.auto_augment
    if policy is not None and not POLICY.fullmatch(policy):
        raise InputError(
            f"augmentation.auto_augment: timm does not know the policy {policy!r}; "
            "expected for example rand-m9-mstd0.5-inc1, augmix-m3-w3, original, or null."
        )
    _check_optimizer(config.optimizer)
    _check_weights(config.model)
    _check_model(config.model, config.data.input_size, config.masked)


def check_paths(config: Config) -> None:
    """That the files exist which the settings name, so that this is not found out after minutes.

    Raises:
        InputError: a file or folder that is not there.
    """
    model, data = config.model, config.data
    if isinstance(model.pretrained, str) and _is_local(model.pretrained) and not _exists(model.pretrained, file=True):
        raise InputError(f"model.pretrained: file {model.pretrained} does not exist; expected {_weights_of(model)}.")
    if model.class_map is not None and not _exists(model.class_map, file=True):
        raise InputError(f"model.class_map: {model.class_map} does not exist; expected a text file, a class per line.")
    if data.dir is not None and data.kind in ("imagefolder", "tar", "wds", "mnist"):
        if not _exists(data.dir):
            raise InputError(f"data.dir: folder {data.dir} does not exist; expected one with {_layout(data)}.")
        for key in ("train_split", "val_split") if data.kind == "imagefolder" else ():
            if not _exists(Path(data.dir) / getattr(data, key)):
                raise InputError(
                    f"data.{key}: {data.dir} holds no folder {getattr(data, key)}; expected {_layout(data)}."
                )
    resume = config.output.resume
    if resume is not None and resume != "auto" and not _exists(resume):
        raise InputError(
            f"output.resume: {resume} does not exist; expected auto, or the folder of a run or checkpoint."
        )


def _layout(data: DataConfig) -> str:
    if data.kind == "mnist":
        return f"{data.train_split}-images-idx3-ubyte.gz and so on"
    inside = "CLASS/*.jpg" if data.kind == "imagefolder" else "*.tar"
    return f"{data.train_split}/{inside} and {data.val_split}/{inside}"


def _exists(path: str | Path, *, file: bool = False) -> bool:
    path = Path(path)
    try:
        return path.is_file() if file else path.is_dir()
    except OSError:  # a name that is too long, or a folder that may not be read
        return False


def _is_local(source: str) -> bool:
    return is_file_or_url(source) and "://" not in source and not source.startswith("hf-hub:")


def _check_packages(config: Config) -> None:
    kind, mode = config.data.kind, config.parallel.mode
    for key, chosen, needed, package, instead in (
        ("data.kind", kind, kind == "hfds", "datasets", "imagefolder, tar or wds"),
        ("parallel.mode", mode, mode.startswith("zero"), "deepspeed", "ddp or fsdp2"),
    ):
        if needed and find_spec(package) is None:
            raise InputError(
                f"{key}: {chosen} needs the package {package}, which is not installed; expected {instead}."
            )


def _check_optimizer(settings: OptimizerConfig) -> None:
    import timm.optim

    known = [str(name) for name in timm.optim.list_optimizers()]
    if settings.name not in known:
        raise InputError(f"optimizer.name: unknown {settings.name!r}; {nearest(settings.name, known)}")
    if settings.name == "adahessian":
        raise InputError(
            "optimizer.name: adahessian needs second-order gradients; expected for example adamw, lamb or sgd."
        )
    try:
        timm.optim.create_optimizer_v2(
            [nn.Parameter(torch.zeros(2, 2))],
            opt=settings.name,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )
    except Exception as error:  # of any type: they are other people's, and so are the packages that they miss
        raise InputError(
            f"optimizer.name: {settings.name} cannot be built with these settings ({_reason(error)}); "
            "expected for example adamw, lamb or sgd."
        ) from None


def _weights_of(model: ModelConfig) -> str:
    tags = find_variant(model.name)[0].tags
    return f"true, false, {', '.join(tags)}, a path or a URL" if tags else "false, a path or a URL"


def _check_weights(model: ModelConfig) -> None:
    """A tag that the model has; whether a file fits shows when it is read."""
    try:
        variant, _ = image_variant(model.name)
    except InputError as error:
        raise InputError(f"model.name: {error}") from None
    pretrained = model.pretrained
    if pretrained is True and not variant.tags:
        raise InputError(
            f"model.pretrained: no weights of {variant.name} are published; expected {_weights_of(model)}."
        )
    if isinstance(pretrained, str) and not is_file_or_url(pretrained) and pretrained not in variant.tags:
        raise InputError(
            f"model.pretrained: {variant.name} has no weights {pretrained!r}; expected {_weights_of(model)}."
        )


def _check_model(settings: ModelConfig, size: tuple[int, ...], simmim: SimmimConfig | None) -> None:
    model = _build_on_meta(settings, size[0], simmim)
    stages = len(model.backbone.stages)
    if settings.freeze_stages > stages:
        raise InputError(
            f"model.freeze_stages: must be at most {stages}, the stages of {settings.name}, "
            f"got {settings.freeze_stages}."
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > LARGEST_MODEL:
        raise InputError(
            f"model.overrides: the model would have {parameters / 1e9:.0f} billion parameters; "
            f"expected at most {LARGEST_MODEL / 1e9:.0f}."
        )
    try:
        with torch.no_grad():
            images = torch.empty(1, *size, device="meta")
            if isinstance(model, SimMIM):
                mask = images[:, 0, :: model.patch_size, :: model.patch_size]
                model.eval()(images, mask)
            else:
                model.eval()(images)
    except Exception as error:
        if not isinstance(error, InputError) and not settings.overrides:
            raise
        key = "data.input_size" if isinstance(error, InputError) else "model.overrides"
        side = find_variant(settings.name)[0].input_size
        raise InputError(
            f"{key}: {settings.name} cannot take pictures of {size[0]}x{size[1]}x{size[2]} ({_reason(error)}); "
            f"expected for example [{size[0]}, {side}, {side}]."
        ) from None


def _build_on_meta(settings: ModelConfig, channels: int, simmim: SimmimConfig | None) -> Classifier | SimMIM:
    name, overrides = settings.name, settings.overrides
    if simmim is not None and find_variant(name)[0].family not in FAMILIES:
        raise InputError(f"train.task: simmim is for Swin and SwinV2, not for {name}; expected one of those.")
    for argument, source in SAID_ELSEWHERE.items():
        if argument in overrides:
            raise InputError(f"model.overrides: {argument} is said by {source}; expected constructor arguments.")
    if overrides.get("in_chans", channels) != channels:
        raise InputError(
            f"model.overrides: in_chans is {overrides['in_chans']!r}, data.input_size has {channels} channels; "
            f"expected {channels}, or leave it out."
        )
    depths = overrides.get("depths", ())
    if isinstance(depths, list) and sum(depth for depth in depths if isinstance(depth, int)) > LARGEST_DEPTH:
        raise InputError(f"model.overrides: depths are more than {LARGEST_DEPTH} blocks; expected fewer in all.")
    for argument, value in overrides.items():
        if not _is_plain(value):
            raise InputError(
                f"model.overrides: {argument} has no value that an argument takes; expected a number up to "
                f"{LARGEST_NUMBER}, true, false, null, text, or a list of them."
            )
    try:
        with torch.device("meta"):
            if simmim is not None:
                return create_simmim(name, norm_target=simmim.norm_target, **{**overrides, "in_chans": channels})
            return create_classifier(name, num_classes=10, **{**overrides, "in_chans": channels})
    except Exception as error:
        if not overrides:
            raise
        raise InputError(
            f"model.overrides: {_reason(error)}; expected arguments of {name} that fit together."
        ) from None


def _is_plain(value: Any, depth: int = 0) -> bool:
    """A value that YAML, JSON and a constructor take; YAML also knows dates, bytes, sets and lists in themselves."""
    if isinstance(value, (list, tuple)):
        return depth < 2 and len(value) <= 64 and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, (int, float)):
        return abs(value) <= LARGEST_NUMBER if math.isfinite(value) else False
    return value is None or isinstance(value, str)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".:")[:400] or type(error).__name__
