"""`import hvt_backbones.timm` puts every image model into timm's registry: `timm.create_model("hvt_swin_tiny")`.

Whatever takes a timm name then takes ours: `hvt_` and a name of `list_models()`, with a tag of its weights after a dot.
The models are `Classifier` and `Backbone`; here is only what timm asks of them beside.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import FeatureInfo, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .backbone import Backbone, check_arguments, is_whole
from .classifier import Classifier
from .create import create_backbone, create_classifier
from .errors import InputError
from .model_file import data_config
from .variants import VARIANTS, Variant
from .weights.inflate import PATCH_PROJECTION
from .weights.published import HUB_PREFIX
from .weights.sources import HUB_FILENAMES, fetch

PREFIX = "hvt_"
OF_THE_HEAD = ("num_classes", "classifier")


class TimmClassifier(Classifier):
    """`model` as timm's classifiers are: with dropout before the head, maps in between and `default_cfg`."""

    def __init__(self, model: Classifier, cfg: dict[str, Any], drop_rate: float = 0.0) -> None:
        super().__init__(model.backbone, 0)
        self.head, self.num_classes, self.global_pool = model.head, model.num_classes, model.global_pool
        self.head_hidden_size, self.in_chans, self.drop_rate = self.num_features, self.backbone.in_chans, drop_rate
        self.feature_info = _feature_info(self.backbone)
        self.pretrained_cfg = self.default_cfg = cfg

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = F.dropout(super().forward_head(features, pre_logits=True), self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages as the next stage takes them (of Swin before any norm), and the last map of all.

        Args:
            x: (B, C, H, W).
            indices: of stages; negative ones count from the end, a number means so many of the last, None all.
            norm: the last stage's map after its norm; in a classifier only this one has a norm of its own.
            stop_early: leave out the stages after the last one of `indices`; the last map of all is then its.
            intermediates_only: without the last map of all.

        Returns:
            The last map, (B, num_features, H', W'), and a list of (B, C_i, H_i, W_i), finest first.

        Raises:
            InputError: there is no such stage, or `output_fmt` is another one.
        """
        if output_fmt != "NCHW":
            raise InputError(f"output_fmt is {output_fmt!r}: the maps are NCHW, permute(0, 2, 3, 1) makes them NHWC")
        chosen = _stages(indices, len(self.backbone.stages), "indices")
        maps: list[Tensor] = []
        normed = self.backbone(x, handed_on=maps, stop=chosen[-1] + 1 if stop_early else None)
        last = (normed or maps)[-1]
        found = [last if norm and i == len(self.backbone.stages) - 1 else maps[i] for i in chosen]
        return found if intermediates_only else (last, found)


class TimmFeatures(nn.Module):
    """What `features_only=True` makes: the maps of `create_backbone`, which are normed as official dense models are.

    timm's own `features_only` models of Swin have no norms: `output_norm=False` is the same. The norms of stages that
    a classifier has not are new, also in a pretrained model.

    Shape: (B, C, H, W) -> a list of (B, C_i, H_i, W_i), finest first.
    """

    def __init__(self, backbone: Backbone, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.in_chans = backbone.in_chans
        self.feature_info = FeatureInfo(_feature_info(backbone), backbone.out_indices)
        self.pretrained_cfg = self.default_cfg = {key: value for key, value in cfg.items() if key not in OF_THE_HEAD}

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x))

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def _feature_info(backbone: Backbone) -> list[dict[str, Any]]:
    info: list[dict[str, Any]] = [
        {"num_chs": channels, "reduction": stride, "module": f"backbone.stages.{i}"}
        for i, (channels, stride) in enumerate(zip(backbone.stage_channels, backbone.stage_strides, strict=True))
    ]
    for i, channels, stride in zip(backbone.out_indices, backbone.channels, backbone.strides, strict=True):
        info[i] |= {"num_chs": channels, "reduction": stride}  # other ones with `out_after_downsample`
    return info


def _stages(indices: int | Sequence[int] | None, count: int, name: str) -> tuple[int, ...]:
    """Numbers of stages, ascending, as timm lets them be given."""
    numbers = range(-count, 0) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
    whole = isinstance(numbers, Sequence) and all(is_whole(number, -count) and number < count for number in numbers)
    if not whole or not len(numbers):
        raise InputError(f"{name} is {indices!r}: give stage numbers from 0 to {count - 1}, or how many of the last")
    return tuple(sorted({number % count for number in numbers}))


def create(
    variant: Variant,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    img_size: int | Sequence[int] | None = None,
    device: Any = None,
    dtype: Any = None,
    pretrained_model_args: dict[str, Any] | None = None,
    **overrides: Any,
) -> TimmClassifier | TimmFeatures:
    """What `timm.create_model("hvt_...")` calls, with timm's arguments and the model's own.

    Args:
        pretrained: load the weights of the tag in the name, or of the first one; those of
            `pretrained_cfg_overlay={"file": path}` in any layout that `load_weights` knows.
        features_only, out_indices: a `TimmFeatures` of these stages, given as in `forward_intermediates`; what is said
            of a head is then left aside.
        num_classes, in_chans: by default those of the weights.
        global_pool: as in `Classifier.reset_classifier`.
        drop_rate: dropout before the head. What the families call `drop_rate` is `proj_drop_rate`, both timm's words.
        img_size: of no effect, as is what timm remembers in `pretrained_model_args`: images may have any size.
        device, dtype: of the parameters.
        **overrides: as in `create_backbone`, such as `window_size` or `drop_path_rate`.

    Raises:
        InputError: an argument that the model has not, or a value that does not fit.
        WeightsError: weights that cannot be found or do not fit.
    """
    if cache_dir is not None:
        raise InputError(f"cache_dir is {str(cache_dir)!r}: set HF_HOME, for files that are not of the Hub TORCH_HOME")
    check_arguments(rates={"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate})
    cfg = resolve_pretrained_cfg(PREFIX + variant.name, pretrained_cfg, pretrained_cfg_overlay)
    arguments = {
        "pretrained": _weights(variant, cfg) if pretrained else False,
        "in_chans": cfg.input_size[0] if in_chans is None else in_chans,
        **({"drop_rate": proj_drop_rate} if proj_drop_rate else {}),
        **overrides,
    }
    with contextlib.nullcontext() if device is None else torch.device(device):
        if features_only:
            depths = overrides.get("depths")
            count = len(depths if isinstance(depths, Sequence) else variant.arch["depths"])
            stages = _stages(out_indices, count, "out_indices")
            backbone = create_backbone(variant.name, out_indices=stages, **arguments)
            return TimmFeatures(backbone, cfg.to_dict()).to(dtype=dtype)
        if out_indices is not None:
            raise InputError("out_indices is for maps: give features_only=True too")
        if num_classes is None:
            num_classes = cfg.num_classes if cfg.num_classes >= 0 else 1000  # -1 is timm's word for as many as usual
        model = create_classifier(variant.name, num_classes=num_classes, **arguments)
        if global_pool not in (None, model.global_pool):
            model.reset_classifier(num_classes, global_pool)
        return TimmClassifier(model, cfg.to_dict(), drop_rate).to(dtype=dtype)


def _weights(variant: Variant, cfg: Any) -> bool | str | Path:
    """The `pretrained` of `create_backbone` for where a configuration of timm says that weights lie."""
    if cfg.state_dict:
        raise InputError("a state_dict in pretrained_cfg is not taken: load_weights(model, state_dict) loads it")
    ours = default_cfgs[PREFIX + variant.name].cfgs.get(cfg.tag or "")
    if ours and not (cfg.source or cfg.file) and (cfg.hf_hub_id, cfg.url) == (ours.hf_hub_id, ours.url):
        return cfg.tag or True
    if cfg.file:
        path = Path(cfg.file)
        files = [path / name for name in HUB_FILENAMES if (path / name).is_file()]  # where timm saves a model
        return files[0] if files else path
    if cfg.hf_hub_id:
        return fetch(HUB_PREFIX + cfg.hf_hub_id, filename=cfg.hf_hub_filename)
    return cfg.url or True


def _published_cfg(variant: Variant, tag: str | None) -> dict[str, Any]:
    """What timm's `PretrainedCfg` says of weights, from what is published of them."""
    preprocessing = data_config(variant.name, tag)
    cfg = {
        **asdict(preprocessing),
        "pool_size": tuple(side // 32 for side in preprocessing.input_size[1:]),
        "first_conv": "backbone." + PATCH_PROJECTION.removesuffix(".weight"),
        "classifier": "head",
    }
    if tag is None:
        return cfg
    weights = variant.published(tag)
    on_hub = weights.source.startswith(HUB_PREFIX)
    place = {"hf_hub_id": weights.source.removeprefix(HUB_PREFIX)} if on_hub else {"url": weights.source}
    return {
        **cfg,
        **place,
        "hf_hub_filename": weights.filename,
        "num_classes": weights.num_classes,
        "license": weights.license,
    }


IMAGE_VARIANTS = {PREFIX + variant.name: variant for variant in VARIANTS.values() if variant.frames is None}
default_cfgs = generate_default_cfgs(  # where `register_model` looks for them
    {
        f"{name}.{tag}" if tag else name: _published_cfg(variant, tag)
        for name, variant in IMAGE_VARIANTS.items()
        for tag in variant.tags or (None,)
    }
)


def _register(name: str, variant: Variant) -> None:
    """By a function of this name in this module, as timm's own are."""
    entry = partial(create, variant)
    entry.__name__, entry.__module__, entry.__doc__ = name, __name__, f"{variant.name} for timm; see `create`."  # type: ignore[attr-defined]
    globals()[name] = register_model(entry)


for _name, _variant in IMAGE_VARIANTS.items():
    _register(_name, _variant)
