"""Weights files that describe themselves: what is written beside the weights, and the model that it makes again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .backbone import Backbone
from .classifier import Classifier
from .create import create_backbone, create_classifier, create_simmim
from .errors import InputError, WeightsError
from .simmim import SimMIM
from .swin import SwinTransformerV2, windows_per_stage
from .variants import Variant, find_variant
from .weights import sources
from .weights.convert import Checkpoint, read_checkpoint
from .weights.files import read_weights
from .weights.load import load_checkpoint
from .weights.position_windows import windows_of_training
from .weights.published import Preprocessing
from .weights.recorded import PREFIX, recorded_arguments, recorded_value
from .weights.sources import is_file_or_url

# what `hvt export` writes, by suffix
EXPORTED = {".onnx": "ONNX", ".xml": "OpenVINO", ".pt2": "torch.export"}


def image_variant(name: str) -> tuple[Variant, str | None]:
    """`find_variant`, which refuses a video model: pictures are no clips.

    Raises:
        InputError: no such model, or one of clips.
    """
    variant, tag = find_variant(name)
    if variant.frames is not None:
        raise InputError(
            f"{variant.name} takes clips, not pictures; expected a model of images (video models are for `video/`)"
        )
    return variant, tag


def data_config(name: str, tag: str | None = None, *, clips: bool = False) -> Preprocessing:
    """The preprocessing that the weights `tag` of the model `name` were published with; of the first without one.

    Args:
        clips: whether the model may be one of clips.
    """
    variant, name_tag = find_variant(name) if clips else image_variant(name)
    return _preprocessing(variant, tag or name_tag)


def _preprocessing(variant: Variant, tag: str | None = None) -> Preprocessing:
    if variant.weights:
        return variant.published(tag).preprocessing
    return Preprocessing(input_size=(3, variant.input_size, variant.input_size))


@dataclass(frozen=True)
class Masking:
    """How SimMIM hid pictures and what it compared, see `random_mask` and `SimMIM`."""

    ratio: float = 0.6
    mask_patch_size: int = 32
    norm_target: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """Weights, in any layout, and all that is needed to build their model and to feed it.

    Attributes:
        source: the name, path or URL that was asked for.
        name: of the model's row in `variants.py`.
        overrides: constructor arguments that differ from the row's.
        num_classes: rows of the head; 0 where there is none.
        class_names: one per class, where the file says them.
        preprocessing: of the pictures.
        masking: of SimMIM's pre-training; where the file does not say it, that of its Swin recipes.
        checkpoint: the weights.
    """

    source: str
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int
    class_names: Sequence[str] | None = None
    preprocessing: Preprocessing
    masking: Masking = Masking()
    checkpoint: Checkpoint

    def check_head(self) -> None:
        """
        Raises:
            WeightsError: the weights have none.
        """
        if not self.num_classes:
            raise WeightsError(f"{self.source} has no classifier head, so it predicts nothing: `hvt features` reads it")

    def classifier(self) -> Classifier:
        """The classifier with the weights, in eval mode."""
        self.check_head()
        model = create_classifier(self.name, num_classes=self.num_classes, **self.overrides)
        load_checkpoint(model, self.checkpoint)
        return model.eval()

    def backbone(self, **arguments: Any) -> Backbone:
        """The backbone with the weights, in eval mode; `arguments` are those of `create_backbone`."""
        model = create_backbone(self.name, **self.overrides, **arguments)
        load_checkpoint(model, self.checkpoint)
        return model.eval()

    def simmim(self) -> SimMIM:
        """The model of SimMIM with the weights, in eval mode."""
        if self.checkpoint.style != "simmim":
            raise WeightsError(
                f"{self.source} has no decoder of SimMIM, so it paints nothing: give one of pre-training"
            )
        model = create_simmim(self.name, norm_target=self.masking.norm_target, **self.overrides)
        load_checkpoint(model, self.checkpoint)
        return model.eval()


def open_model(
    source: str, model: str | None = None, weights_key: str | None = None, *, clips: bool = False
) -> ModelFile:
    """Read weights by a model's name (`swin_tiny`, `swin_base.in22k`), from a file or from a URL.

    Args:
        source: the name, path or URL.
        model: the name of the model in a file that does not say it; files of this project's trainer do.
        weights_key: which of several sets of weights in the file, see `load_weights`.
        clips: whether `source` may be the name of a model of clips.

    Raises:
        InputError: no such model or file, a file that does not say its model, or one that `hvt export` wrote.
        WeightsError: weights that cannot be fetched or read, or are of another model.
    """
    if Path(source).suffix in EXPORTED:
        raise InputError(
            f"{source} is an exported model, which `hvt predict`, `hvt features` and classification.validate take: "
            "give the weights that it was made of"
        )
    if is_file_or_url(source):
        weights = read_weights(sources.fetch(source), weights_key)
        checkpoint = read_described(source, weights.tensors, weights.metadata)
        return describe_weights(source, checkpoint, weights.metadata, model)
    variant, tag = find_variant(source) if clips else image_variant(source)
    if model is not None:
        raise InputError(f"--model {model} is for checkpoint files, and {source} is the name of a model: give one")
    published = variant.published(tag)
    weights = read_weights(sources.fetch(published.source, filename=published.filename), weights_key)
    return _model_file(
        source,
        read_described(source, weights.tensors, {PREFIX + "model": variant.name}),
        {},
        variant,
        published.preprocessing,
    )


def read_described(
    source: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], layout: str = "auto"
) -> Checkpoint:
    """`read_checkpoint` with what the text beside the weights tells of them.

    Raises:
        InputError, WeightsError: as `read_checkpoint`, with the name of the source.
    """
    ape_size = recorded_arguments(source, metadata, named=False).get("ape_size")
    try:
        return read_checkpoint(tensors, layout, ape_size=ape_size)
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error


def describe_weights(
    source: str, checkpoint: Checkpoint, metadata: Mapping[str, str], model: str | None = None
) -> ModelFile:
    """What `open_model` returns, from weights that have been read already and the text that was beside them.

    Raises:
        InputError: as `open_model`.
    """
    recorded = metadata.get(PREFIX + "model")
    name = model or recorded
    if name is None:
        raise InputError(f"{source} does not say which model it is of: add --model NAME (`hvt models` lists them)")
    variant, _ = find_variant(name)
    if recorded is not None and find_variant(recorded)[0].family != variant.family:
        raise WeightsError(f"{source} is of the model {recorded}, not of {model}: leave --model out")
    return _model_file(source, checkpoint, metadata, variant, _preprocessing(variant))


def _model_file(
    source: str, checkpoint: Checkpoint, metadata: Mapping[str, str], variant: Variant, preprocessing: Preprocessing
) -> ModelFile:
    overrides = recorded_arguments(source, metadata, named=False)
    kernel = checkpoint.tensors["stages.0.downsample.proj.weight"]
    in_chans = kernel.shape[1] if kernel.dim() > 1 else 3
    if in_chans != 3:
        overrides = {"in_chans": in_chans, **overrides}
        # of other channels nothing is published: the mean over ImageNet's three
        preprocessing = replace(
            preprocessing,
            input_size=(in_chans, *preprocessing.input_size[1:]),
            mean=(0.449,) * in_chans,
            std=(0.226,) * in_chans,
        )
    names = recorded_value(source, metadata, "class_names", list)
    if names is not None and len(names) != checkpoint.classes:
        raise WeightsError(
            f"{source} has {len(names)} class names for {checkpoint.classes} classes: write its metadata anew"
        )
    preprocessing = _recorded_preprocessing(source, metadata, preprocessing)
    if variant.family == "swinv2" and checkpoint.position_windows is None:
        windows = windows_of_training(variant.with_overrides(overrides), preprocessing.input_size[1:])
        checkpoint = replace(checkpoint, position_windows=windows)
    return ModelFile(
        source=source,
        name=variant.name,
        overrides=overrides,
        num_classes=checkpoint.classes,
        class_names=names,
        preprocessing=preprocessing,
        masking=_recorded_masking(source, metadata),
        checkpoint=checkpoint,
    )


def _recorded_preprocessing(source: str, metadata: Mapping[str, str], default: Preprocessing) -> Preprocessing:
    """What the trainer wrote beside the weights, for what it did not write the default."""
    facts: dict[str, Any] = {}
    for key in ("input_size", "mean", "std"):
        if (value := recorded_value(source, metadata, key, list)) is not None:
            facts[key] = tuple(value)
            length = 3 if key == "input_size" else default.input_size[0]
            if len(value) != length:
                raise WeightsError(
                    f"{source}: its entry {PREFIX}{key} has {len(value)} numbers, its weights need {length}"
                )
    if (crop_pct := recorded_value(source, metadata, "crop_pct", (int, float))) is not None:
        facts["crop_pct"] = crop_pct
    if PREFIX + "interpolation" in metadata:
        facts["interpolation"] = metadata[PREFIX + "interpolation"]
    return replace(default, **facts)


def _recorded_masking(source: str, metadata: Mapping[str, str]) -> Masking:
    recorded = recorded_value(source, metadata, "masking", dict) or {}
    try:
        return Masking(**recorded)
    except TypeError:
        raise WeightsError(
            f"{source}: its entry {PREFIX}masking is {recorded!r}, not the settings that the trainer writes"
        ) from None


def metadata_of(
    name: str,
    overrides: Mapping[str, Any],
    preprocessing: Preprocessing,
    *,
    class_names: Sequence[str] = (),
    masking: Masking | None = None,
) -> dict[str, str]:
    """The text beside the weights of a model, from which `open_model` makes it again.

    Args:
        name: of the model.
        overrides: constructor arguments that differ from its row's.
        preprocessing: of its pictures.
        class_names: one per class of a classifier.
        masking: of SimMIM's pre-training.
    """
    facts: dict[str, Any] = {
        "model": name,
        "overrides": dict(overrides),
        "num_classes": len(class_names),
        "class_names": list(class_names),
    }
    facts |= {key: value for key, value in asdict(preprocessing).items() if key != "crop_mode"}  # the trainer's is one
    if masking is not None:
        facts["masking"] = asdict(masking)
    return {PREFIX + key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}


def record_windows(metadata: Mapping[str, str], backbone: Backbone) -> dict[str, str]:
    """`metadata` of a model, with the `pretrained_window_size` that weights told it where its arguments do not."""
    if not isinstance(backbone, SwinTransformerV2):
        return dict(metadata)
    name, windows = "pretrained_window_size", backbone.pretrained_window_size
    said = recorded_arguments("the model", metadata, named=True).get(name, 0)
    if windows == tuple(windows_per_stage(said, len(windows), backbone.axes, least=0)):
        return dict(metadata)
    overrides = recorded_arguments("the model", metadata, named=False) | {name: windows}
    return {**metadata, PREFIX + "overrides": json.dumps(overrides)}


def entry(metadata: Mapping[str, str], name: str) -> str:
    """What `metadata_of` wrote under this name."""
    return metadata[PREFIX + name]


def kept_metadata(metadata: Mapping[str, str], name: str | None = None) -> dict[str, str]:
    """What of the text beside weights stays true in another layout; `name` of the model, where it is known anew."""
    kept = {key: text for key, text in metadata.items() if key.startswith(PREFIX)}
    return kept if name is None else {**kept, PREFIX + "model": name}


def epoch_metadata(epoch: int, **figures: float) -> dict[str, str]:
    """Of which epoch of a training the weights are, and how good: `top1`, `val_loss`."""
    return {PREFIX + "epoch": str(epoch), **{PREFIX + name: f"{value:.4f}" for name, value in figures.items()}}
