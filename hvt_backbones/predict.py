"""Classes and feature maps of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .atomic import whole_file
from .backbone import Backbone
from .classifier import Classifier
from .images import Reading, check_channels, read_image
from .model_file import Preprocessing


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
        stages = {name: stage.numpy() for name, stage in maps.items()}
        numpy.savez(file, images=names, **stages)  # type: ignore[arg-type] # its flags are named otherwise
