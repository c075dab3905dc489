"""Classes and feature maps of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .atomic import whole_file
from .backbone import Backbone
from .classifier import Classifier
from .errors import InputError
from .images import Reading, check_channels, read_image
from .model_file import Preprocessing

if TYPE_CHECKING:
    from .exported import ExportedModel


def class_names(num_classes: int) -> list[str] | None:
    """Names of ImageNet's classes in the order of the published heads: 1000, or Swin's 21841; None for other counts."""
    if num_classes not in (1000, 21841):
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k" if num_classes == 1000 else "imagenet-22k-ms")
    return [info.index_to_description(index) for index in range(num_classes)]


def wordnet_ids(num_classes: int) -> dict[str, int]:
    """WordNet id -> class of ImageNet's published heads of 1000 or Swin's 21841 classes; empty for other counts."""
    if num_classes not in (1000, 21841):
        return {}
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k" if num_classes == 1000 else "imagenet-22k-ms")
    return {info.index_to_label_name(index): index for index in range(num_classes)}


def class_positions(names: Sequence[str], found: Sequence[str], where: str) -> dict[str, int]:
    """Class of the data -> class of the model whose classes have these `names`; the data may have fewer.

    Folders that are numbers, as ImageNet-V2's, stand for the model's classes of these indices, whatever their names,
    unless these are numbers too. ImageNet's WordNet ids (n01440764) are looked up where the model's classes are
    ImageNet's, or have no names.

    Raises:
        InputError: the data has other classes; `where` says whose the names are.
    """
    position = {name: index for index, name in enumerate(names)}
    if position.keys() >= set(found):
        return {name: position[name] for name in found}
    numbers = {name: int(name) for name in found if name.isdecimal()}
    if len(numbers) == len(found) and len(set(numbers.values())) == len(found):
        named = {int(name): index for index, name in enumerate(names) if name.isdecimal()}
        if len(named) == len(names):  # names that are numbers themselves: 01 and 1 are the same
            if named.keys() >= set(numbers.values()):
                return {name: named[number] for name, number in numbers.items()}
        elif max(numbers.values()) < len(names):
            return numbers
    nameless = list(names) == [str(index) for index in range(len(names))]
    synsets = wordnet_ids(len(names)) if nameless or list(names) == class_names(len(names)) else {}
    if synsets.keys() >= set(found):
        return {name: synsets[name] for name in found}
    missing = sorted(position.keys() - set(found))
    unknown = sorted(set(found) - (synsets.keys() if synsets.keys() & set(found) else position.keys()))
    lists = [f"{', '.join(part[:5])}{', ...' if len(part) > 5 else ''}" for part in (unknown, missing)]
    more = f" (it has {lists[1]} without such pictures)" if missing else ""
    raise InputError(
        f"the classes differ: {lists[0]} only in the data, and unknown to {where}{more}. Remove these classes from the "
        "data, or name its folders as the model's classes, by their indices from 0, or by ImageNet's WordNet ids."
    )


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
    transform = preprocessing.transform()
    batch: list[Tensor] = []
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
def predict(model: Classifier | ExportedModel, batches: Iterable[Tensor]) -> Tensor:
    """Class probabilities, (number of pictures, number of classes), on the CPU."""
    found = [model(batch).float().softmax(-1).cpu() for batch in batches]
    return torch.cat(found) if found else torch.empty(0, model.num_classes)


@torch.inference_mode()
def features(backbone: Backbone | ExportedModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
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
        stages = {name: stage.numpy() for name, stage in maps.items()}
        numpy.savez(file, images=names, **stages)  # type: ignore[arg-type] # its flags are named otherwise
