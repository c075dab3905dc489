"""`HVTBackbone`: a backbone as a module of MMEngine, with weights of its own, of the frameworks and of the papers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..backbone import Backbone, check_arguments, is_whole
from ..create import create_backbone
from ..errors import InputError, WeightsError
from ..variants import find_variant
from ..weights import LoadReport, load_weights
from ..weights.files import read_content
from ..weights.load import fit_tensors, load_pretrained
from ..weights.report import shown_windows, some
from ..weights.sources import fetch, is_file_or_url, published_weights, read_source

# Where the backbones of mmdetection 3 and mmsegmentation 1 compute otherwise than their authors' code. Swin does not.
STYLES: dict[str, dict[str, dict[str, Any]]] = {
    "openmmlab": {
        "pvt_v2": {"patch_norm_eps": 1e-6, "sr_norm_eps": 1e-6},
        "twins_pcpvt": {"norm_eps": 1e-5, "pad_patches": True},
        "twins_svt": {"norm_eps": 1e-5, "pad_patches": True, "mask_padding": True},
    },
    "official": {},
}
# the layouts of checkpoints of whole models -> the style that their models had
LAYOUT_STYLES = {"mmdet": "openmmlab", "official": "official"}
# of an `init_cfg` of weights: those of MMEngine's `PretrainedInit`, what its configurations add, and ours; weights are
# read on the CPU wherever `map_location` would have them
PRETRAINED_KEYS = ("type", "_scope_", "checkpoint", "prefix", "map_location", "weights_key")
HEADS = ("head.", "cls_head.")  # of mmpretrain's and mmaction2's classifiers
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@MODELS.register_module()
class HVTBackbone(BaseModule):
    """A backbone of this library as a module of MMEngine: (B, C, H, W) images in, a tuple of NCHW maps out.

    Of a video model: (B, C, T, H, W) clips in, and the last map out, (B, channels, T', H', W') without a tuple around
    it, as the heads of mmaction2 take it; with several `out_indices` a tuple of maps.

    It takes the place of a framework's own backbone: a checkpoint of a detector or segmentor that was made with
    mmdetection's Swin or PVTv2, mmsegmentation's Swin or Twins, mmaction2's Video Swin, or in the official
    repositories, loads as it is (`load_from`, `load_checkpoint`, `init_detector`), and the numbers agree.

    Args:
        name: a name of `list_models()`.
        pretrained: True for the first weights of the model, a tag ("in22k"), or what `load_weights` takes: a path, a
            URL, "hf-hub:org/name", in any layout; for a video model also the name of an image model to inflate, such as
            "swin_tiny" or "swin_base.in22k". As everything in MMEngine they are loaded by `init_weights`, which
            training calls, so that a detector built for testing downloads nothing.
        weights_key: which of several sets of weights in the file to take, such as "state_dict_ema", as in
            `load_weights`; by default the trained ones, before their moving average.
        out_indices: the stages that are returned, from 0; by default all, of a video model the last.
        frozen_stages: -1 for none; 0 freezes the patch embedding and the absolute position embedding; `n` also the
            first n stages with the norms of their outputs. As in mmdetection's Swin, the layer that downsamples from a
            frozen stage is frozen with it. What is frozen has no gradients and stays in eval mode.
        norm_eval: keep the norms in eval mode during training. The norms here are LayerNorms, which compute alike in
            either mode; this is for what takes their place.
        with_cp: recompute activations in the backward pass: of each block (True), or as
            `Backbone.set_grad_checkpointing` calls it.
        max_logits: attend part by part, so many attention logits at a time, as `Backbone.set_sequential_attention`;
            None for all at once.
        style: whose computation to follow where code bases differ in more than names. "openmmlab": the eps of norms
            of mmdetection's PVTv2 and mmsegmentation's Twins, and the latter's padding. "official": the authors' own
            code, which `create_backbone` follows too (its segmentation code of Twins-SVT needs `mask_padding=True`
            besides). Swin and SwinV2 are the same in both. Loading a whole model of the other kind says so.
        init_cfg: MMEngine's; `dict(type="Pretrained", checkpoint=..., prefix=..., weights_key=...)` takes the sources
            and layouts of `pretrained` and is read without running code of the file. `prefix` names the backbone where
            the file has several.
        **arguments: constructor arguments of the family's class, such as `drop_path_rate` or `window_size`.

    Attributes:
        model: the `Backbone`.
        channels, strides: of each map.

    Raises:
        InputError: an unknown model or argument, or a value that does not fit.
        WeightsError: from `init_weights`, weights that cannot be found, read or matched.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool | str | Path | None = False,
        weights_key: str | None = None,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool | str = False,
        max_logits: int | None = None,
        style: str = "openmmlab",
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(style, str) or style not in STYLES:
            raise InputError(f"style is {style!r}: choose one of {', '.join(STYLES)}")
        check_arguments(flags={"norm_eval": norm_eval})
        variant = find_variant(name)[0]
        family, self._video = variant.family, variant.frames is not None
        depths = arguments.get("depths", variant.arch["depths"])
        if out_indices is None and self._video and isinstance(depths, Sequence):  # others `create_backbone` refuses
            out_indices = (len(depths) - 1,)
        arguments = {**STYLES[style].get(family, {}), **arguments}
        self.model = create_backbone(name, out_indices=out_indices, **arguments)
        self.channels = self.model.channels
        self.strides = self.model.strides
        self.name = name
        self.style = style
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self._pretrained, self._weights_key = _pretrained_source(name, pretrained), weights_key
        _check_init_cfg(init_cfg)
        if self._pretrained is not None and any(_is_pretrained(config) for config in self._init_cfgs()):
            raise InputError("pretrained and init_cfg both name weights: give one of them")
        if not isinstance(weights_key, str | None):
            raise InputError(f"weights_key is {weights_key!r}: give a key of the file, such as 'state_dict_ema'")
        if weights_key is not None and self._pretrained is None:
            raise InputError(f"weights_key is {weights_key!r} without `pretrained`: give both, or both in init_cfg")
        self.model.set_grad_checkpointing(with_cp)
        self.model.set_sequential_attention(max_logits)
        self._frozen_layers = self._freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """(B, C, [T,] H, W) -> (B, channels[i], [T',] H / strides[i], W / strides[i]) each, finest first."""
        # Convolutions of the neck keep the memory format, and mmcv's RoIAlign takes channels-last memory for NCHW.
        maps = tuple(stage.contiguous() for stage in self.model(images))
        return maps[0] if self._video and len(maps) == 1 else maps

    def train(self, mode: bool = True) -> HVTBackbone:
        super().train(mode)
        for layer in self._frozen_layers:
            layer.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, NORMS):
                    module.eval()
        return self

    def _freeze(self) -> list[nn.Module]:
        """Freeze, and return what `Backbone.freeze_stages` does not keep in eval mode by itself."""
        stages, count = self.model.stages, self.frozen_stages
        if not is_whole(count, -1) or count > len(stages):
            raise InputError(f"frozen_stages is {count!r}: give -1 for none, or 0 to {len(stages)}")
        if count < 0:
            return []
        self.model.freeze_stages(count)
        layers = [module for name, module in self.model.named_children() if name != "stages"]
        layers += [stage.downsample for stage in stages[count : count + 1]]
        of_embedding = [
            parameter for name, parameter in self.model.named_parameters() if not name.startswith("stages.")
        ]
        for parameter in [*of_embedding, *(parameter for layer in layers for parameter in layer.parameters())]:
            parameter.requires_grad_(False)
        return layers

    def init_weights(self) -> None:
        """Load `pretrained` or what `init_cfg` names; without either the model's own starting values stay."""
        if self.is_init:
            return
        whole, given = self.init_cfg, self._init_cfgs()
        # MMEngine's own initialiser of "Pretrained" would unpickle whatever the file holds
        self.init_cfg: Any = [config for config in given if not _is_pretrained(config)]
        try:
            super().init_weights()
        finally:
            self.init_cfg = whole
        sources = [config for config in given if _is_pretrained(config)]
        if self._pretrained is not None:
            sources.append({"checkpoint": self._pretrained, "weights_key": self._weights_key})
        for config in sources:
            report = self._load(config["checkpoint"], config.get("prefix"), config.get("weights_key"))
            print_log(f"{self.name}: {report}", logger="current")

    def _init_cfgs(self) -> list[Mapping[str, Any]]:
        given: Any = self.init_cfg
        return [given] if isinstance(given, Mapping) else list(given or ())

    def _load(self, source: str | Path | Literal[True], prefix: str | None, weights_key: str | None) -> LoadReport:
        if not prefix or source is True or not is_file_or_url(source):
            return self._told(load_pretrained(self.model, *find_variant(self.name), source, weights_key=weights_key))
        state_dict = read_source(source, weights_key).tensors
        start = prefix.rstrip(".") + "."
        if not any(key.startswith(start) for key in state_dict):
            raise WeightsError(f"{source} has no keys that begin with {start!r}: its keys are {some(list(state_dict))}")
        # a head stays with its backbone: it tells that norms which the file lacks are new, not lost
        of_prefix = {key: tensor for key, tensor in state_dict.items() if key.startswith((start, *HEADS))}
        return self._told(load_weights(self.model, of_prefix))

    def _told(self, report: LoadReport) -> LoadReport:
        """Refuse what the configuration does not say: a test builds the model by it, without these weights."""
        if report.pretrained_window_size is not None:
            windows = shown_windows(report.pretrained_window_size)
            raise WeightsError(
                f"the weights of {self.name} were trained with another window than the configuration says: "
                f"add pretrained_window_size={windows} to the backbone"
            )
        return report

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # MMEngine's and PyTorch's loaders both pass here before they hand what `state_dict` then holds to the children
        given = {
            key.removeprefix(prefix): tensor
            for key, tensor in state_dict.items()
            if key.startswith(prefix) and isinstance(tensor, Tensor)
        }
        if given:
            self._translate(state_dict, prefix, given)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict: dict[str, Any], prefix: str, given: dict[str, Tensor]) -> None:
        """Bring the keys below `prefix` into our names; those that nothing explains stay, for the loader to report."""
        try:
            fitted, report = fit_tensors(self.model, given)
        except WeightsError as error:
            print_log(f"the backbone keeps its values: {error}", logger="current", level=logging.WARNING)
            return
        for key in given.keys() - set(report.unexpected):
            del state_dict[prefix + key]
        state_dict.update({f"{prefix}model.{name}": tensor for name, tensor in fitted.items()})
        if report.resized or report.inflated or report.adapted or report.dropped:
            print_log(f"{self.name}: {report}", logger="current")
        style = LAYOUT_STYLES.get(report.layout, self.style)
        if style != self.style and STYLES["openmmlab"].get(report.family):
            print_log(
                f"the checkpoint has the layout {report.layout}, whose {report.family} computes a little otherwise: "
                f"for its exact numbers build the backbone with style={style!r}",
                logger="current",
                level=logging.WARNING,
            )


def _is_pretrained(config: Mapping[str, Any]) -> bool:
    kind = config.get("type", "Pretrained" if "checkpoint" in config else None)  # as mmdet's PVT takes it
    return kind is PretrainedInit or (isinstance(kind, str) and kind.rpartition(".")[2] == "Pretrained")


def _check_init_cfg(init_cfg: Any) -> None:
    configs = init_cfg if isinstance(init_cfg, list | tuple) else [] if init_cfg is None else [init_cfg]
    for config in configs:
        if not isinstance(config, Mapping) or not ("type" in config or _is_pretrained(config)):
            raise InputError(f"init_cfg is {init_cfg!r}: give a dictionary with a `type`, or a list of them")
        if not _is_pretrained(config):
            continue
        if unknown := [key for key in config if key not in PRETRAINED_KEYS]:
            raise InputError(f"init_cfg has no key {unknown[0]!r} for weights: it takes {', '.join(PRETRAINED_KEYS)}")
        source = config.get("checkpoint")
        if source is not True and not isinstance(source, str | Path):
            raise InputError(f"the checkpoint of init_cfg is {source!r}: give a weight tag, a path or a URL")
        for key in ("prefix", "weights_key"):
            if not isinstance(config.get(key), str | None):
                raise InputError(f"{key} of init_cfg is {config[key]!r}: give a string, or leave it out")


def _pretrained_source(name: str, pretrained: bool | str | Path | None) -> str | Path | Literal[True] | None:
    """What to load later; a model or tag that is not published is refused at once."""
    if pretrained is None or pretrained is False:
        return None
    if pretrained is not True and not isinstance(pretrained, str | Path):
        raise InputError(f"pretrained is {pretrained!r}: give True, False, a weight tag, a path or a URL")
    if pretrained is True or not is_file_or_url(pretrained):
        variant, tag = find_variant(name)
        published_weights(variant, tag if pretrained is True else str(pretrained))
    return pretrained


def check_checkpoint(source: str | Path) -> Path:
    """Make sure that a checkpoint can be read without running code of it, before MMEngine reads it.

    MMEngine reads a file in full, programs included, where PyTorch's restricted reader refuses it.

    Args:
        source: a path, an http(s) or file URL, or "hf-hub:org/name"; downloaded into the cache if need be.

    Returns:
        The path of the file, to be given to MMEngine instead of `source`.

    Raises:
        WeightsError: the file cannot be found, is damaged, or needs code to be read.
    """
    path = fetch(source)
    read_content(path)
    return path


def backbones_of(model: nn.Module) -> dict[str, Backbone]:
    """Path of each `HVTBackbone` in a model -> what it wraps."""
    return {name: module.model for name, module in model.named_modules() if isinstance(module, HVTBackbone)}
