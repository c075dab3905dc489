"""Load weights of any known layout into a backbone or a classifier, all of them or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..classifier import Classifier
from ..errors import InputError, WeightsError
from ..layers.window_attention import PositionBias
from ..simmim import SimMIM
from ..swin import SwinTransformerV2, WindowAttention
from ..variants import Variant
from .class_map import ClassMap, read_class_map
from .convert import OF_SIMMIM, OUR_SIMMIM, Checkpoint, read_checkpoint
from .inflate import PATCH_PROJECTION, inflate_checkpoint
from .keymap import Layout, template
from .layouts import ALL, OURS, our_layout
from .position_windows import fitting_windows
from .recorded import PREFIX, recorded_position_windows
from .report import LoadReport, some
from .resize import (
    adapt_input_channels,
    image_window,
    resize_position_embedding,
    resize_position_table,
    video_window,
)
from .sources import Source, is_file_or_url, pretrained_file, read_source

Model = Backbone | Classifier | SimMIM

STAGE_NORM = template("stages.{s}.norm.{p}")
# their dense models add norms that also feed the next stage to weights trained without them
FAMILIES_THAT_ADD_NORMS = ("twins_pcpvt", "twins_svt")
# beside a backbone without a place in ours: the heads that mmpretrain and mmaction2 put on an `HVTBackbone`, and what
# masked pre-training learns
NOT_OF_DENSE_MODELS = (".head.fc.weight", ".cls_head.fc_cls.weight", ".mask_token")

logger = logging.getLogger(__name__)


def load_weights(
    model: Model,
    source: Source,
    *,
    layout: str = "auto",
    class_map: ClassMap | None = None,
    weights_key: str | None = None,
) -> LoadReport:
    """Load weights into `model`, and account for every key of both.

    Each kind of model takes each kind of checkpoint, also a detector's or segmentor's. Position tables are resized
    to the model's windows, the patch embedding is adapted to its input channels; a head of another class count is
    left out. Weights of a 2-D Swin are inflated for a Video Swin, see `inflate`. Values are stored in the dtype of the
    model's parameters.

    A SwinV2 without a `pretrained_window_size` takes that of weights that tell it: by what the trainer wrote beside
    them, by the official code's coordinates, or as published. Other weights, such as a bare `state_dict`, tell none.

    transformers' `Swinv2Backbone` has no `small_map`: where a map, of images of its configuration's size, is not larger
    than the window, that stage has the map for its window and no shift, whatever the images. `small_map="shrink"` does
    the same for images of that size; for others no argument does. Its weights in a model that pads are a warning.

    Args:
        model: changed in place; on any error it stays as it was.
        source: a mapping of keys to tensors (a state dict, also inside `model`, `state_dict` and the like), a path, an
            http(s) or file URL, or "hf-hub:org/name".
        layout: one of `LAYOUTS`; recognised by the keys by default.
        class_map: for each class of the model the row of the checkpoint's head, as a sequence, a tensor or the path of
            a text file with one index a line. The rows of ImageNet-1K's classes in ImageNet-22K are
            `data/map22kto1k.txt` of the repository microsoft/Swin-Transformer.
        weights_key: which of several sets of weights in `source` to take, such as "state_dict_ema", or
            "model.state_dict_ema" where it lies deeper; by default the trained ones, before their moving average. The
            report names what else was there.

    Returns:
        The report; printed, it is a short table.

    Raises:
        InputError: an argument of the wrong kind.
        WeightsError: the weights cannot be read, or do not fit the model; the message names the keys, or the
            `pretrained_window_size` that the weights contradict.
    """
    if not isinstance(model, Model):
        raise InputError(f"load_weights takes a Backbone, a Classifier or a SimMIM, not a {type(model).__name__}")
    return _load(model, source, {}, layout, class_map, weights_key)


def load_pretrained(
    model: Model,
    variant: Variant,
    tag: str | None,
    pretrained: bool | str | Path,
    *,
    class_map: ClassMap | None = None,
    weights_key: str | None = None,
) -> LoadReport:
    """Load what `pretrained` of `create_backbone` means for a model whose name speaks of the weights `tag`.

    Raises:
        InputError, WeightsError: as `load_weights`.
    """
    published = isinstance(pretrained, bool) or not is_file_or_url(pretrained)
    described = {PREFIX + "model": variant.name} if published else {}
    return _load(model, pretrained_file(variant, tag, pretrained), described, "auto", class_map, weights_key)


def _load(
    model: Model,
    source: Source,
    described: Mapping[str, str],
    layout: str,
    class_map: ClassMap | None,
    weights_key: str | None,
) -> LoadReport:
    """`load_weights`; `described` is known of weights that do not tell it."""
    found = read_source(source, weights_key)
    backbone = _backbone(model)
    checkpoint = read_checkpoint(found.tensors, layout, layouts=_layouts(backbone), ape_size=_grid(backbone))
    if checkpoint.position_windows is None:
        checkpoint.position_windows = recorded_position_windows(source, {**described, **found.metadata})
    report = load_checkpoint(model, checkpoint, class_map)
    report.weights_key, report.other_weights = found.key, found.others
    return report


def load_checkpoint(model: Model, checkpoint: Checkpoint, class_map: ClassMap | None = None) -> LoadReport:
    """What `load_weights` does with weights in our names, which stay as they are.

    Raises:
        InputError, WeightsError: as `load_weights`.
    """
    plan = _Plan(model, checkpoint)
    if class_map is not None:
        plan.map_classes(class_map)
    plan.match()
    plan.check()
    windows = fitting_windows(plan.backbone, checkpoint.position_windows)
    _warn_of_other_windows(checkpoint, plan.backbone)
    with torch.no_grad():
        for name, tensor in plan.copies.items():
            plan.state[name].copy_(tensor)
    if windows is not None:
        assert isinstance(plan.backbone, SwinTransformerV2)
        plan.backbone.pretrained_window_size = plan.report.pretrained_window_size = windows
    return plan.report


def fit_tensors(backbone: Backbone, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoadReport]:
    """What `load_weights` would copy into `backbone`, for another program to load; nothing is changed or refused.

    Returns:
        The backbone's key -> tensor, as resized or adapted (one that cannot be fitted is there as it was), and the
        report, whose `dropped` and `unexpected` name the keys of `tensors` that have no place.

    Raises:
        WeightsError: the layout is not recognised, its rules do not fit the tensors, or the family is another one.
    """
    plan = _Plan(backbone, read_checkpoint(tensors, layouts=_layouts(backbone), ape_size=_grid(backbone)))
    plan.match()
    unfitted = {plan.names[key]: tensor for key, tensor in plan.checkpoint.tensors.items() if key in plan.names}
    return {**unfitted, **plan.copies}, plan.report


def _backbone(model: Model) -> Backbone:
    return model if isinstance(model, Backbone) else model.backbone


def _fit_family(checkpoint: Checkpoint, backbone: Backbone) -> Checkpoint:
    """Images' weights are inflated for video."""
    if (checkpoint.layout.family, backbone.family) == ("swin", "video_swin"):
        attentions = [_window_attentions(stage) for stage in backbone.stages]
        patch_frames = backbone.get_parameter(PATCH_PROJECTION).shape[2]
        return inflate_checkpoint(checkpoint, [each[0].window_size for each in attentions if each], patch_frames)
    if checkpoint.layout.family != backbone.family:
        raise WeightsError(
            f"the weights are of the family {checkpoint.layout.family} ({checkpoint.layout.name} layout), "
            f"the model is a {type(backbone).__name__}: build the model that they belong to"
        )
    return checkpoint


def _window_attentions(module: nn.Module) -> list[WindowAttention]:
    return [part for part in module.modules() if isinstance(part, WindowAttention)]


def _warn_of_other_windows(checkpoint: Checkpoint, backbone: Backbone) -> None:
    """Say where equal weights give other maps: transformers' `SwinBackbone` pads small maps, its `Swinv2Backbone` not.

    Classifiers are none of it: of all code bases, they shrink the window and their dense models pad.
    """
    of_backbone = (checkpoint.layout.name, checkpoint.style, backbone.family) == ("huggingface", "dense", "swinv2")
    if of_backbone and any(attention.small_map == "pad" for attention in _window_attentions(backbone)):
        logger.warning(
            "the weights are of transformers' Swinv2Backbone, which shrinks the window where a map is not larger; this "
            'model pads the map, so that its last maps can differ: build it with small_map="shrink" for the same ones'
        )


def _layouts(backbone: Backbone) -> list[Layout]:
    """All tables, and for a family that has none its own keys."""
    if backbone.family in OURS:
        return ALL
    return [our_layout(backbone.family, next(iter(backbone.state_dict()))), *ALL]


def _grid(backbone: Backbone) -> tuple[int, ...] | None:
    """The grid of the model's absolute position embedding; for a model without one any will do."""
    embedding = getattr(backbone, "absolute_pos_embed", None)
    return tuple(embedding.shape[1:3]) if isinstance(embedding, Tensor) and embedding.dim() == 4 else None


class _Plan:
    """What to copy where, found without touching the model."""

    def __init__(self, model: Model, checkpoint: Checkpoint) -> None:
        self.model = model
        self.backbone = _backbone(model)
        self.report = LoadReport(checkpoint.layout.name, checkpoint.layout.family)
        self.of_classifier = _is_of_a_classifier(checkpoint)
        self.checkpoint = checkpoint = _fit_family(checkpoint, self.backbone)
        self.report.add("recomputed", checkpoint.computed)
        self.report.add("unexpected", checkpoint.unknown)
        for key, reason in checkpoint.dropped.items():
            self.report.add("dropped", [key], reason)
        self.copies: dict[str, Tensor] = {}
        self.misfits: list[str] = []
        self.mapped = ""
        # our key, without `backbone.`, -> the model's own key
        self.state = model.state_dict(keep_vars=True)
        self.names = {key.removeprefix("backbone.") if model is not self.backbone else key: key for key in self.state}

    def map_classes(self, class_map: ClassMap) -> None:
        """Replace the checkpoint's head by the rows that the map names."""
        rows, given = read_class_map(class_map), self.checkpoint.classes
        classes = getattr(self.model, "num_classes", 0)
        if not given or not classes:
            raise WeightsError("class_map selects rows of a head: give a Classifier, and weights with a head")
        if len(rows) != classes:
            raise WeightsError(f"class_map has {len(rows)} indices, the model {classes} classes: give one for each")
        outside = [row for row in rows.tolist() if not 0 <= row < given]
        if outside:
            raise WeightsError(f"class_map names class {outside[0]}, the head of the weights has {given}, from 0")
        tensors = self.checkpoint.tensors
        heads = {key: tensors[key] for key in ("head.weight", "head.bias") if key in tensors}
        mapped = {key: tensor[rows.to(tensor.device)] for key, tensor in heads.items()}
        self.checkpoint = replace(self.checkpoint, tensors=tensors | mapped)
        self.mapped = f"rows of {given} classes by class_map"

    def match(self) -> None:
        """Give each tensor of the checkpoint its place, and each parameter without one its reason."""
        own_head = self.names.get("head.weight")
        given, own = self.checkpoint.classes, len(self.state[own_head]) if own_head else 0
        other_classes = given and own and given != own
        taken = set()
        for key, tensor in self.checkpoint.tensors.items():
            theirs = self.checkpoint.sources[key]
            is_head = key.startswith("head.")
            if is_head and other_classes:
                self.report.add("dropped", theirs, f"a head of {given} classes, the model has {own}")
            elif key in self.names:
                taken.add(key)
                self._place(key, tensor)
            elif is_head:
                self.report.add("dropped", theirs, "the model has no head")
            elif key in OUR_SIMMIM:
                self.report.add("dropped", theirs, OF_SIMMIM)
            elif reason := self._why_not_built(key):
                self.report.add("dropped", theirs, reason)
            else:
                self.report.add("unexpected", theirs)
        for key, name in self.names.items():
            if key in taken:
                continue
            if key.startswith("head.") and (other_classes or not given):
                reason = "a head of another class count" if other_classes else "the weights have no head"
                self.report.add("initialised", [name], reason)
            elif key in OUR_SIMMIM and self.checkpoint.style != "simmim":
                self.report.add("initialised", [name], "the weights are of no masked pre-training")
            elif self._is_new_norm(key):
                self.report.add("initialised", [name], "the weights have no norm after this stage")
            else:
                self.report.add("missing", [name])

    def _why_not_built(self, key: str) -> str | None:
        """Why the model lacks a tensor of the backbone on purpose."""
        if not key.startswith("stages."):
            return None
        stage = int(key.split(".")[1])
        built = sum(len(each.blocks) > 0 for each in self.backbone.stages)
        if stage >= built:
            return f"the model ends with stage {built - 1}"
        last = self.checkpoint.stages - 1
        # a norm that the next stage sees is part of what was trained, the others only shape an output
        if STAGE_NORM.match(key) and (stage == last or not self.backbone.norm_feeds_next_stage):
            return "the norm of an output that the model does not have"
        return None

    def _is_new_norm(self, key: str) -> bool:
        """Whether only dense models have this norm, and the weights are a classifier's, with one after its last stage.

        Any other weights could have had it: where they have not, their maps were others.
        """
        added = not self.backbone.norm_feeds_next_stage or self.backbone.family in FAMILIES_THAT_ADD_NORMS
        norm = STAGE_NORM.match(key)
        last = self.checkpoint.stages - 1
        only_last = _normed_stages(self.checkpoint.tensors) == [last]
        return norm is not None and added and norm["s"] != last and only_last and self.of_classifier

    def _place(self, key: str, tensor: Tensor) -> None:
        name = self.names[key]
        parameter = self.state[name]
        if parameter.is_meta:
            raise WeightsError(f"{name} is on the meta device: give the model memory first (model.to_empty)")
        if not tensor.is_floating_point():
            self.misfits.append(f"{name} is {tensor.dtype} in the weights, no floating-point number")
            return
        row, reason = "loaded", ""
        if tensor.shape != parameter.shape:
            fitted, row, reason = self._fit(key, tensor, parameter)
            if fitted is None:
                shapes = f"{tuple(tensor.shape)} in the weights, {tuple(parameter.shape)} in the model"
                self.misfits.append(f"{name} is {shapes}")
                return
            tensor = fitted
        elif key in self.checkpoint.inflated:
            row, reason = "inflated", self.checkpoint.inflated[key]
        elif key.startswith("head.") and self.mapped:
            row, reason = "adapted", self.mapped
        self.copies[name] = tensor
        self.report.add(row, [name], reason)

    def _fit(self, key: str, tensor: Tensor, parameter: Tensor) -> tuple[Tensor | None, str, str]:
        """The tensor in the parameter's shape, the row of the report and the reason; None if they have no relation."""
        bias = self.backbone.get_submodule(key.removesuffix(".table")) if key.endswith(".table") else None
        if isinstance(bias, PositionBias) and tensor.dim() == 2 and tensor.shape[1] == parameter.shape[1]:
            new = bias.window_size
            old: tuple[int, ...] | None
            old = (image_window if len(new) == 2 else video_window)(len(tensor), new)
            if old is not None:
                sizes = " to ".join("x".join(map(str, window)) for window in (old, new))
                return resize_position_table(tensor, old, new), "resized", f"window {sizes}"
        if key == "absolute_pos_embed" and tensor.dim() == 4 and tensor.shape[-1] == parameter.shape[-1]:
            size = parameter.shape[1:-1]
            sizes = " to ".join(f"{h}x{w}" for h, w in (tensor.shape[1:-1], size))
            return resize_position_embedding(tensor, size), "resized", f"grid {sizes}"
        if key == PATCH_PROJECTION and tensor.dim() == parameter.dim():
            chans = parameter.shape[1]
            if tensor.shape[:1] + tensor.shape[2:] == parameter.shape[:1] + parameter.shape[2:]:
                return adapt_input_channels(tensor, chans), "adapted", f"{tensor.shape[1]} to {chans} input channels"
        return None, "", ""

    def check(self) -> None:
        """Raise one error for all that is not explained."""
        report = self.report
        wrong = []
        if report.missing:
            wrong.append(f"{len(report.missing)} keys of the model are missing ({some(report.missing)})")
        if report.unexpected:
            wrong.append(f"{len(report.unexpected)} keys have no place in the model ({some(report.unexpected)})")
        if self.misfits:
            wrong.append(f"{len(self.misfits)} tensors do not fit ({some(self.misfits, 2)})")
        if not wrong and not report.ok:
            wrong.append("no key matches the model")
        if wrong:
            raise WeightsError(
                f"the {report.layout} weights of the family {report.family} do not fit the model: "
                f"{'; '.join(wrong)}{self._compare()}{self._compare_norms()}: "
                "build the model that the weights belong to"
            )

    def _compare_norms(self) -> str:
        given, own = _normed_stages(self.checkpoint.tensors), _normed_stages(self.names)
        if not any(STAGE_NORM.match(key.removeprefix("backbone.")) for key in self.report.missing):
            return ""
        words = "norm_after_stage" if self.backbone.norm_feeds_next_stage else "out_indices and output_norm"
        return f"; the weights have norms after the stages {given}, the model after {own} (see {words})"

    def _compare(self) -> str:
        given = _architecture(self.checkpoint.tensors)
        own = _architecture({key: self.state[name] for key, name in self.names.items()})
        return "" if given == own else f"; the weights have {given}, the model has {own}"


def _is_of_a_classifier(checkpoint: Checkpoint) -> bool:
    """Told by a head, or by a final norm without a number: the norms of outputs are numbered, be it only one."""
    sources = [key for ours, keys in checkpoint.sources.items() if STAGE_NORM.match(ours) for key in keys]
    numbered = any(char.isdigit() for key in sources for char in key.removeprefix(checkpoint.wrapper))
    beside = any(f".{key}".endswith(NOT_OF_DENSE_MODELS) for key in checkpoint.dropped)
    return checkpoint.style != "dense" or not numbered or beside


def _normed_stages(tensors: Iterable[str]) -> list[int]:
    return sorted({norm["s"] for key in tensors if (norm := STAGE_NORM.match(key))})


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    """What tells the variants of a family apart: blocks of each stage, and channels of the first."""
    depths: dict[int, int] = {}
    for key in tensors:
        if key.startswith("stages.") and ".blocks." in key:
            _, stage, _, block, *_ = key.split(".")
            depths[int(stage)] = max(depths.get(int(stage), 0), int(block) + 1)
    projection = tensors.get(PATCH_PROJECTION)
    width = f" and {len(projection)} channels" if projection is not None and projection.dim() else ""
    return f"depths {tuple(depths[stage] for stage in sorted(depths))}{width}"
