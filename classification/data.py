"""ImageFolder data through timm: readers, transforms, and loaders that know their rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from hvt_backbones import InputError
from hvt_backbones.predict import Preprocessing, read_image

from .config import AugmentationConfig, DataConfig
from .digits import lay_out_digits

SEED_STRIDE = 100_003  # between the seeds of two runs; epochs and ranks count upward from each


class PictureFolder(ImageDataset):
    """timm's dataset over `folder/CLASS/**/*.png`, where a picture that cannot be read is an error, not a substitute.

    Args:
        folder: one sub-folder per class.
        channels: 3 reads pictures as RGB, 1 as grey.
        transform: from a PIL picture to a tensor (C, H, W).

    Raises:
        InputError: no such folder, no pictures at all or in one class, or a zero-byte picture; on access, a picture
            that cannot be decoded.
    """

    def __init__(self, folder: Path, *, channels: int, transform: Any = None) -> None:
        super().__init__(str(folder), reader=_scan(folder), transform=transform)
        self.channels = channels
        self.class_names: list[str] = list(self.reader.class_to_idx)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.reader.samples[index]
        picture = read_image(path, self.channels)
        return (picture if self.transform is None else self.transform(picture)), target


def _scan(folder: Path) -> ReaderImageFolder:
    expected = "expected one sub-folder of pictures per class"
    if not folder.is_dir():
        raise InputError(f"data folder {folder} does not exist or is not a folder; {expected}.")
    try:
        reader = ReaderImageFolder(str(folder))
    except RuntimeError:
        raise InputError(f"data folder {folder} holds no pictures; {expected}.") from None
    if "" in reader.class_to_idx:
        raise InputError(f"data folder {folder} has pictures that lie in no class; {expected}.")
    paths = [Path(path) for path, _ in reader.samples]
    filled = {path.relative_to(folder).parts[0] for path in paths}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and child.name not in filled:
            raise InputError(f"class folder {child} holds no pictures; add some, or remove it.")
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"picture {path} is empty (0 bytes); replace or delete it.")
    return reader


def data_root(config: DataConfig) -> Path:
    """The folder above the splits."""
    return Path(config.dir or f"outputs/data/{config.kind}")


def open_data(config: DataConfig, augmentation: AugmentationConfig) -> tuple[PictureFolder, PictureFolder]:
    """The training and the evaluation pictures of a recipe.

    Raises:
        InputError: see `PictureFolder`; or the two have different classes.
    """
    root = data_root(config)
    if config.kind == "digits":
        lay_out_digits(root)
    channels = config.input_size[0]
    train = PictureFolder(root / config.train_split, channels=channels, transform=train_transform(config, augmentation))
    val = PictureFolder(
        root / config.val_split,
        channels=channels,
        transform=preprocessing(config).transform(),
    )
    check_classes(train.class_names, val.class_names, f"{root / config.train_split}", f"{root / config.val_split}")
    return train, val


def check_classes(expected: Sequence[str], found: Sequence[str], expected_where: str, found_where: str) -> None:
    """`InputError`, with the first few names, where two lists of classes differ."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} only in {where}"
            for names, where in ((missing, expected_where), (extra, found_where))
            if names
        ]
        raise InputError(f"the classes differ: {'; '.join(parts)}. Both need the same class folders.")


def train_transform(config: DataConfig, augmentation: AugmentationConfig) -> Any:
    return create_transform(
        config.input_size,
        is_training=True,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=config.interpolation,
        mean=config.mean,
        std=config.std,
        re_prob=augmentation.random_erasing,
        re_mode=augmentation.erasing_mode,
    )


def preprocessing(config: DataConfig) -> Preprocessing:
    """How a picture becomes the model's input outside of training; `hvt predict` does the same."""
    return Preprocessing(
        input_size=config.input_size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )


class RankSlice(Sampler[int]):
    """Every `world`-th picture from `rank` on: all ranks together see each exactly once, none twice."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.indices = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def train_loader(
    dataset: PictureFolder, config: DataConfig, *, seed: int, rank: int, world: int, pin: bool
) -> DataLoader:
    """Shuffled by (seed, epoch), the same on every rank, which then takes its share; whole batches only."""
    sampler = DistributedSampler(
        dataset,
        num_replicas=world,
        rank=rank,
        shuffle=True,
        drop_last=True,
        seed=seed * SEED_STRIDE,  # the sampler adds the epoch: seed 1 must not be seed 0 an epoch later
    )
    return DataLoader(
        dataset, config.batch_size, sampler=sampler, num_workers=config.workers, pin_memory=pin, drop_last=True
    )


def eval_loader(
    dataset: PictureFolder, batch_size: int, workers: int, *, rank: int, world: int, pin: bool
) -> DataLoader:
    sampler = RankSlice(len(dataset), rank, world)
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin)


def batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, targets) on `device`; a bad picture in a worker process ends as the `InputError` that it was."""
    try:
        for images, targets in loader:
            yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    except InputError as error:
        # a worker's error arrives with its traceback as the message
        raise InputError(str(error).split("InputError: ")[-1]) from None
