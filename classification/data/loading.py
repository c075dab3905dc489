"""The data of a recipe: opened, transformed, and loaded in batches by each rank from wherever it left off.

`python -m classification.data` describes the data of a recipe, checks every picture, or measures the loader
(report.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from hvt_backbones import InputError
from hvt_backbones.model_file import Preprocessing

from ..config import AugmentationConfig, DataConfig
from ..signals import leave_signals_to_the_parent, sigterm_later
from .crop import RandomCrop
from .digits import lay_out_digits
from .finish import Finish
from .mnist import ReaderMnist
from .pictures import Noise, Pictures, Sample
from .readers import Reader, ReaderFolder, ReaderHuggingFace, ReaderShards, ReaderShare, find_shards
from .sampler import TrainSampler


class Batch(NamedTuple):
    """Images (B, C, H, W), targets, data set indices and seeds (B,) int64, and what was passed over.

    The images are bytes on their way to the device, and there float32, ready for the model.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    seeds: Tensor
    unreadable: list[str]


def data_root(config: DataConfig) -> Path:
    """The folder above the splits."""
    return Path(config.dir or f"outputs/data/{config.kind}")


def open_pictures(
    root: Path,
    split: str | None,
    config: DataConfig,
    transform: Any,
    *,
    channels: int,
    crop: RandomCrop | None = None,
    finish: Finish | None = None,
    share: float = 1.0,
    seed: int = 0,
) -> Pictures:
    """The pictures of one split of a folder, or of that itself, with so many channels.

    Args:
        transform, crop, finish: of `Pictures`.
        share: of each class's pictures, drawn by `seed`.

    Raises:
        InputError: nothing there, or not of this kind (see readers.py); with `on_error="fail"` also a file of zero
            bytes, where that is known before it is read.
    """
    reader: Reader
    if config.kind == "hfds":
        reader = ReaderHuggingFace(str(root), split)
    elif config.kind == "mnist":
        reader = ReaderMnist(root, split or "t10k")
    elif config.kind in ("tar", "wds"):
        reader = ReaderShards(find_shards(root, split), webdataset=config.kind == "wds")
    else:
        reader = ReaderFolder(root if split is None else root / split)
    if config.on_error == "fail":
        reader.check_sizes()
    if share < 1:
        reader = ReaderShare(reader, share, seed)
    pictures = Pictures(
        reader,
        channels=channels,
        transform=transform,
        crop=crop,
        finish=finish,
        on_error=config.on_error,
        max_errors=config.max_errors,
    )
    if config.class_order == "text" and config.kind in ("imagefolder", "tar"):
        pictures.sort_as_text()
    return pictures


def open_data(config: DataConfig, augmentation: AugmentationConfig, seed: int = 0) -> tuple[Pictures, Pictures]:
    """The training and the evaluation pictures of a recipe; `seed` draws `data.train_share` of the former.

    Raises:
        InputError: see `open_pictures`; or the two have different classes.
    """
    if config.kind == "synthetic":
        noise = Noise(config.synthetic_images, config.synthetic_classes, config.input_size)
        return noise, Noise(max(1, config.synthetic_images // 10), config.synthetic_classes, config.input_size)
    root = data_root(config)
    if config.kind == "digits":
        lay_out_digits(root)
    train = open_pictures(
        root,
        config.train_split,
        config,
        augmentations(config, augmentation),
        channels=config.input_size[0],
        crop=random_crop(config, augmentation),
        finish=Finish(config.mean, config.std, augmentation.random_erasing, augmentation.erasing_mode),
        share=config.train_share,
        seed=seed,
    )
    val = open_for_evaluation(root, config.val_split, config, preprocessing(config))
    for name in train.reader.empty:
        raise InputError(f"class folder {root / config.train_split / name} holds no pictures; add some, or remove it.")
    val.use_classes(train.class_names, f"{root / config.train_split}")
    return train, val


def open_for_evaluation(root: Path, split: str | None, config: DataConfig, preparation: Preprocessing) -> Pictures:
    """The pictures of one split of a folder, or of that itself, whole and prepared as the model's are.

    Raises:
        InputError: see `open_pictures`.
    """
    return open_pictures(
        root,
        split,
        config,
        preparation.transform(normalize=False),
        channels=preparation.input_size[0],
        finish=Finish(preparation.mean, preparation.std),
    )


def random_crop(config: DataConfig, augmentation: AugmentationConfig) -> RandomCrop:
    """What is read of a training picture."""
    return RandomCrop(
        (config.input_size[1], config.input_size[2]), augmentation.scale, augmentation.ratio, config.interpolation
    )


def augmentations(config: DataConfig, augmentation: AugmentationConfig) -> Any:
    """What timm does to the crop, up to its bytes."""
    transform = create_transform(
        preprocessing(config).input_size,
        is_training=True,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        normalize=False,
    )
    del transform.transforms[0]  # its own crop
    return transform


def preprocessing(config: DataConfig) -> Preprocessing:
    """How a picture becomes the model's input outside of training; `hvt predict` does the same."""
    channels, height, width = config.input_size
    return Preprocessing(
        input_size=(channels, height, width),
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


def train_loader(
    dataset: Pictures, config: DataConfig, *, seed: int, rank: int, world: int, accumulation: int = 1, pin: bool
) -> Loader:
    """Batches in the order of a `TrainSampler`, which is the loader's `batch_sampler`; whole steps only."""
    sampler = TrainSampler(
        len(dataset),
        config.batch_size,
        seed=seed,
        rank=rank,
        world=world,
        accumulation=accumulation,
        repeats=config.repeated_augmentation,
    )
    return Loader(dataset, batch_sampler=sampler, **_loading(dataset, config.workers, pin))


def eval_loader(dataset: Pictures, batch_size: int, workers: int, *, rank: int, world: int, pin: bool) -> Loader:
    """Every picture exactly once over all ranks."""
    return Loader(dataset, batch_size, sampler=range(rank, len(dataset), world), **_loading(dataset, workers, pin))


def _loading(dataset: Pictures, workers: int, pin: bool) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "multiprocessing_context": None if dataset.forks or not workers else "spawn",
        "pin_memory": pin,
        "collate_fn": _collate,
        "worker_init_fn": leave_signals_to_the_parent,
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # else every iterator draws from torch's own
    }


class Loader(DataLoader):
    """Ends its workers at once also where it is part of a reference cycle, as in a trainer or a caught exception.

    The garbage collector would take the workers' queues first, so that the iterator could not tell them to end and
    would wait for each of them, five seconds and in vain. Held from outside, it goes after the loader and before its
    queues.
    """

    dataset: Pictures
    batch_sampler: Any  # of training a TrainSampler
    _held: Any = None

    def __iter__(self) -> Any:
        with sigterm_later():
            iterator = super().__iter__()
        if self.num_workers and iterator is not self._held:
            self._held = iterator
            weakref.finalize(self, _let_go, iterator)
        return iterator


def _let_go(iterator: Any) -> None:
    """The caller's reference was the point."""


def _collate(samples: Sequence[Sample]) -> Batch:
    kept = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in kept if sample.image is not None]
    return Batch(
        images=_stack(images) if images else torch.empty(0),
        targets=torch.tensor([sample.target for sample in kept], dtype=torch.int64),
        indices=torch.tensor([sample.index for sample in kept], dtype=torch.int64),
        seeds=torch.tensor([sample.seed for sample in kept], dtype=torch.int64),
        unreadable=[name for sample in samples for name in sample.unreadable],
    )


def _stack(images: list[Tensor]) -> Tensor:
    """(B, C, H, W), bytes in Pillow's order (`channels_last`): to turn them is left to the device."""
    if images[0].dtype is not torch.uint8:
        return torch.stack(images)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def batches(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The loader's batches on `device`, none of them empty.

    Raises:
        InputError: a picture that cannot be read, or a worker process that died.
    """
    held: Batch | None = None  # one behind, to take along the unreadable pictures of a batch that holds nothing else
    for batch in _errors_in_one_line(loader):
        if held is None or not len(held.images):
            held = batch if held is None else batch._replace(unreadable=held.unreadable + batch.unreadable)
        elif not len(batch.images):
            held = held._replace(unreadable=held.unreadable + batch.unreadable)
        else:
            yield to_device(held, loader, device)
            held = batch
    if held is not None:
        if not len(held.images):
            raise InputError(f"data.on_error: no picture can be read; the first is {held.unreadable[0]}.")
        yield to_device(held, loader, device)


def endless(loader: Loader, device: torch.device | None) -> Iterator[Batch]:
    """The batches of epoch after epoch, to measure how fast they come: on `device`, or as they leave the workers."""

    def of_epoch(number: int) -> Iterator[Batch]:
        loader.batch_sampler.set_position(number, 0)
        return _errors_in_one_line(loader) if device is None else batches(loader, device)

    return chain.from_iterable(map(of_epoch, count()))


def to_device(batch: Batch, loader: Loader, device: torch.device) -> Batch:
    """A batch of the loader on `device`, ready for the model."""
    images, targets, indices = (tensor.to(device, non_blocking=True) for tensor in batch[:3])
    if images.dtype is torch.uint8:
        assert loader.dataset.finish is not None  # else its transform gives no bytes
        images = loader.dataset.finish(images, batch.seeds.tolist())
    return batch._replace(images=images, targets=targets, indices=indices)


def _errors_in_one_line(loader: Loader) -> Iterator[Batch]:
    try:
        yield from loader
    except InputError as error:
        message = str(error)
        if message.startswith("Caught "):  # in a worker: the message is its traceback
            message = message.strip().splitlines()[-1].partition(": ")[2]
        raise InputError(message) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"data.workers: a process that decodes pictures died ({' '.join(str(error).split())}); memory or shared "
            "memory (/dev/shm) may be short: use fewer workers or a smaller data.batch_size."
        ) from None
