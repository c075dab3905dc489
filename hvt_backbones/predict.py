"""From a model's name or a checkpoint file, and pictures, to classes or feature maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .atomic import whole_file
from .backbone import Backbone
from .classifier import Classifier
from .create import create_backbone, create_classifier, is_file_or_url
from .errors import InputError, WeightsError
from .images import Reading, check_channels, read_image
from .variants import Variant, find_variant

if TYPE_CHECKING:
    from PIL.Image import Image

    from .weights.published import PublishedWeights


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

    def transform(self) -> Callable[[Image], Tensor]:
        """A function from a picture to a (C, H, W) float tensor."""
        from timm.data import create_transform

        return create_transform(**asdict(self), is_training=False)


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


def data_config(name: str, tag: str | None = None) -> Preprocessing:
    """The preprocessing that the weights `tag` of the model `name` were published with; of the first without one."""
    variant, name_tag = image_variant(name)
    return _published_preprocessing(variant.published(tag or name_tag))


def _published_preprocessing(published: PublishedWeights) -> Preprocessing:
    return Preprocessing(
        input_size=published.input_size,
        mean=published.mean,
        std=published.std,
        interpolation=published.interpolation,
        crop_pct=published.crop_pct,
    )


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
        state_dict: the weights.
    """

    source: str
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int
    class_names: Sequence[str] | None = None
    preprocessing: Preprocessing
    state_dict: Mapping[str, Tensor]

    def classifier(self) -> Classifier:
        """The classifier with the weights, in eval mode."""
        if not self.num_classes:
            raise WeightsError(f"{self.source} has no classifier head, so it predicts nothing: `hvt features` reads it")
        from .weights import load_weights

        model = create_classifier(self.name, num_classes=self.num_classes, **self.overrides)
        load_weights(model, self.state_dict)
        return model.eval()

    def backbone(self, **arguments: Any) -> Backbone:
        """The backbone with the weights, in eval mode; `arguments` are those of `create_backbone`."""
        from .weights import load_weights

        model = create_backbone(self.name, **self.overrides, **arguments)
        load_weights(model, self.state_dict)
        return model.eval()


def open_model(source: str, model: str | None = None, weights_key: str | None = None) -> ModelFile:
    """Read weights by a model's name (`swin_tiny`, `swin_base.in22k`), from a file or from a URL.

    Args:
        source: the name, path or URL.
        model: the name of the model in a file that does not say it; files of this project's trainer do.
        weights_key: which of several sets of weights in the file, see `load_weights`.

    Raises:
        InputError: no such model or file, or a file that does not say its model.
        WeightsError: weights that cannot be fetched or read, or are of another model.
    """
    from .weights.fetch import fetch
    from .weights.files import read_metadata, read_state_dict

    if is_file_or_url(source):
        path = fetch(source)
        return describe_weights(source, read_state_dict(path, key=weights_key), read_metadata(path), model)
    variant, tag = image_variant(source)
    if model is not None:
        raise InputError(f"--model {model} is for checkpoint files, and {source} is the name of a model: give one")
    published = variant.published(tag)
    path = fetch(published.source, filename=published.filename)
    return _model_file(source, read_state_dict(path, key=weights_key), {}, variant, _published_preprocessing(published))


def describe_weights(
    source: str, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str], model: str | None = None
) -> ModelFile:
    """What `open_model` returns, from weights that have been read already and the text that was beside them.

    Raises:
        InputError: as `open_model`.
    """
    name = model or metadata.get("hvt.model")
    if name is None:
        raise InputError(f"{source} does not say which model it is of: add --model NAME (`hvt models` lists them)")
    variant, _ = find_variant(name)
    recorded = metadata.get("hvt.model")
    if recorded is not None and find_variant(recorded)[0].family != variant.family:
        raise WeightsError(f"{source} is of the model {recorded}, not of {model}: leave --model out")
    return _model_file(source, state_dict, metadata, variant, _published_preprocessing(variant.published()))


def _model_file(
    source: str,
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    variant: Variant,
    preprocessing: Preprocessing,
) -> ModelFile:
    from .weights.convert import read_checkpoint

    try:
        tensors = read_checkpoint(state_dict).tensors
    except WeightsError as error:
        raise WeightsError(f"{source}: {error}") from error
    head = tensors.get("head.weight")
    overrides = recorded_value(source, metadata, "hvt.overrides", dict) or {}
    in_chans = tensors["stages.0.downsample.proj.weight"].shape[1]
    if in_chans != 3:
        overrides = {"in_chans": in_chans, **overrides}
        # of other channels nothing is published: the mean over ImageNet's three
        preprocessing = replace(
            preprocessing,
            input_size=(in_chans, *preprocessing.input_size[1:]),
            mean=(0.449,) * in_chans,
            std=(0.226,) * in_chans,
        )
    num_classes = 0 if head is None else head.shape[0]
    names = recorded_value(source, metadata, "hvt.class_names", list)
    if names is not None and len(names) != num_classes:
        raise WeightsError(f"{source} has {len(names)} class names for {num_classes} classes: write its metadata anew")
    return ModelFile(
        source=source,
        name=variant.name,
        overrides=overrides,
        num_classes=num_classes,
        class_names=names,
        preprocessing=_recorded_preprocessing(source, metadata, preprocessing),
        state_dict=state_dict,
    )


def recorded_value(source: str | Path, metadata: Mapping[str, str], key: str, kind: type | tuple[type, ...]) -> Any:
    """A JSON value among the text that the trainer writes beside the weights; None where it wrote none.

    Raises:
        WeightsError: the text is no JSON, or a value of another kind.
    """
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kind):
        raise WeightsError(f"{source}: its entry {key} is {metadata[key]!r}, not the JSON that the trainer writes")
    return value


def _recorded_preprocessing(source: str, metadata: Mapping[str, str], default: Preprocessing) -> Preprocessing:
    """What the trainer wrote beside the weights, for what it did not write the default."""
    facts: dict[str, Any] = {}
    for key in ("input_size", "mean", "std"):
        if (value := recorded_value(source, metadata, f"hvt.{key}", list)) is not None:
            facts[key] = tuple(value)
            length = 3 if key == "input_size" else default.input_size[0]
            if len(value) != length:
                raise WeightsError(f"{source}: its entry hvt.{key} has {len(value)} numbers, its weights need {length}")
    if (crop_pct := recorded_value(source, metadata, "hvt.crop_pct", (int, float))) is not None:
        facts["crop_pct"] = crop_pct
    if "hvt.interpolation" in metadata:
        facts["interpolation"] = metadata["hvt.interpolation"]
    return replace(default, **facts)


def class_names(num_classes: int) -> list[str] | None:
    """Names of ImageNet's classes in the order of the published heads: 1000, or Swin's 21841; None for other counts."""
    if num_classes not in (1000, 21841):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k" if num_classes == 1000 else "imagenet-22k-ms")
    return [info.index_to_description(index) for index in range(num_classes)]


def image_batches(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    device: torch.device,
    batch_size: int = 16,
    reading: Reading[Path] | None = None,
) -> Iterator[Tensor]:
    """(B, C, H, W) batches of the pictures, in order, without those that `reading` passes over."""
    check_channels(preprocessing.input_size[0])
    reading = reading or Reading("fail")
    transform, batch = preprocessing.transform(), []
    for path in paths:
        picture = reading.read(lambda path: read_image(path, preprocessing.input_size[0]), path)
        if picture is not None:
            batch.append(transform(picture))
        if len(batch) == batch_size:
            yield torch.stack(batch).to(device)
            batch = []
    if batch:
        yield torch.stack(batch).to(device)


@torch.inference_mode()
def predict(model: Classifier, batches: Iterable[Tensor]) -> Tensor:
    """Class probabilities, (number of pictures, number of classes), on the CPU."""
    found = [model(batch).float().softmax(-1).cpu() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, model.num_classes)


@torch.inference_mode()
def features(backbone: Backbone, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """`stage0`, `stage1`, ... -> (number of pictures, C, H, W), on the CPU; nothing of no pictures."""
    maps = [tuple(stage.cpu() for stage in backbone(batch)) for batch in batches]
    if not maps:
        return {}
    stages = (torch.cat(stage) for stage in zip(*maps, strict=True))
    return {f"stage{i}": stage for i, stage in zip(backbone.out_indices, stages, strict=True)}


def write_features(path: Path, maps: Mapping[str, Tensor], images: Sequence[Path]) -> None:
    """Write feature maps to `path`, by its suffix as safetensors or as NumPy's npz; whole or not at all.

    The pictures' paths, in the order of the first axis, are the JSON list `images`.

    Raises:
        InputError: it cannot be written.
    """
    from .weights.files import save_state_dict

    names = json.dumps([str(image) for image in images])
    if path.suffix == ".safetensors":
        save_state_dict(maps, path, {"images": names})
        return
    import numpy

    with whole_file(path) as partial, partial.open("wb") as file:
        numpy.savez(file, images=names, **{name: stage.numpy() for name, stage in maps.items()})
