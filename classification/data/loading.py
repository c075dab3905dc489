"""The data of a recipe: opened, transformed, and loaded in batches by each rank from wherever it left off.

`python -m classification.data` describes the data of a recipe, checks every picture, or measures the loader
(report.py).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from hvt_backbones import InputError
from hvt_backbones.model_file import Preprocessing

from ..config import AugmentationConfig, DataConfig
from .digits import lay_out_digits
from .pictures import Noise, OnError, Pictures, Sample
from .readers import open_reader
from .sampler import RankSlice, TrainSampler


class Batch(NamedTuple):
    """Images (B, C, H, W) float32, targets and data set indices (B,) int64, and which pictures were passed over."""

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: list[str]


def data_root(config: DataConfig) -> Path:
    """The folder above the splits."""
    return Path(config.dir or f"outputs/data/{config.kind}")


def open_pictures(
    path: str | Path,
    *,
    split: str | None = None,
    kind: str = "imagefolder",
    channels: int,
    transform: Any,
    on_error: OnError = "fail",
    max_errors: float = DataConfig.max_errors,
    class_order: Literal["natural", "text"] = DataConfig.class_order,
) -> Pictures:
    """The pictures of one split: `path` itself, or the `split` of it.

    Raises:
        InputError: nothing there, or not of this `kind` (see readers.py); with `on_error="fail"` also a file of zero
            bytes.
    """
    reader = open_reader("imagefolder" if kind == "digits" else kind, Path(path), split)
    if on_error == "fail" and hasattr(reader, "check_sizes"):
        reader.check_sizes()
    pictures = Pictures(reader, channels=channels, transform=transform, on_error=on_error, max_errors=max_errors)
    if class_order == "text" and kind in ("imagefolder", "tar"):
        pictures.sort_as_text()
    return pictures


def open_data(config: DataConfig, augmentation: AugmentationConfig) -> tuple[Pictures, Pictures]:
    """The training and the evaluation pictures of a recipe.

    Raises:
        InputError: see `open_pictures`; or the two have different classes.
    """
    if config.kind == "synthetic":
        counts = config.synthetic_images, max(1, config.synthetic_images // 10)
        train, val = (Noise(count, config.synthetic_classes, config.input_size) for count in counts)
        return train, val
    root = data_root(config)
    if config.kind == "digits":
        lay_out_digits(root)
    splits = {
        config.train_split: train_transform(config, augmentation),
        config.val_split: preprocessing(config).transform(),
    }
    train, val = (
        open_pictures(
            root,
            split=split,
            kind=config.kind,
            channels=config.input_size[0],
            transform=transform,
            on_error=config.on_error,
            max_errors=config.max_errors,
            class_order=config.class_order,
        )
        for split, transform in splits.items()
    )
    for name in getattr(train.reader, "empty", ()):
        raise InputError(f"class folder {root / config.train_split / name} holds no pictures; add some, or remove it.")
    val.use_classes(train.class_names, f"{root / config.train_split}")
    return train, val


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


def train_loader(
    dataset: Pictures, config: DataConfig, *, seed: int, rank: int, world: int, accumulation: int = 1, pin: bool
) -> DataLoader:
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
    return _Loader(dataset, batch_sampler=sampler, **_loading(dataset, config.workers, pin))


def eval_loader(dataset: Pictures, batch_size: int, workers: int, *, rank: int, world: int, pin: bool) -> DataLoader:
    """Every picture exactly once over all ranks."""
    sampler = RankSlice(len(dataset), rank, world)
    return _Loader(dataset, batch_size, sampler=sampler, **_loading(dataset, workers, pin))


def _loading(dataset: Pictures, workers: int, pin: bool) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "multiprocessing_context": None if dataset.forks or not workers else "spawn",
        "pin_memory": pin,
        "collate_fn": _collate,
        "worker_init_fn": _leave_signals_to_the_parent,
        "persistent_workers": workers > 0,
        "generator": torch.Generator(),  # else every iterator draws from torch's own
    }


class _Loader(DataLoader):
    """Ends its workers at once also where it is part of a reference cycle, as in a trainer or a caught exception.

    The garbage collector would take the workers' queues first, so that the iterator could not tell them to end and
    would wait for each of them, five seconds and in vain. Held from outside, it goes after the loader and before its
    queues.
    """

    _held: Any = None

    def __iter__(self) -> Any:
        with _signals_later():
            iterator = super().__iter__()
        if self.num_workers and iterator is not self._held:
            self._held = iterator
            weakref.finalize(self, _let_go, iterator)
        return iterator


@contextmanager
def _signals_later() -> Iterator[None]:
    """SIGTERM waits within: a worker that is being started does not yet know what to do with it, and inherits this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _let_go(iterator: Any) -> None:
    """The caller's reference was the point."""


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to all processes of a job is for the main one to answer: it may want to finish its step and save.

    Workers end when the main process tells them to, and within seconds when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_unless_left_alone
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_termination, daemon=True).start()


def _report_unless_left_alone(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # multiprocessing's thread that hands tensors over has nobody to hand them to once the main process is interrupted
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _await_termination() -> None:
    parent = multiprocessing.parent_process().pid  # the operating system's may be a server that forks for it
    while psutil.pid_exists(parent):  # one that was killed tells nobody
        came = signal.sigtimedwait({signal.SIGTERM}, 5)
        if came is not None and came.si_pid == parent:
            break
    os._exit(0)


def _collate(samples: Sequence[Sample]) -> Batch:
    kept = [sample for sample in samples if sample.image is not None]
    return Batch(
        images=torch.stack([sample.image for sample in kept]) if kept else torch.empty(0),
        targets=torch.tensor([sample.target for sample in kept], dtype=torch.int64),
        indices=torch.tensor([sample.index for sample in kept], dtype=torch.int64),
        unreadable=[name for sample in samples for name in sample.unreadable],
    )


def batches(loader: DataLoader, device: torch.device) -> Iterator[Batch]:
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
            yield _to_device(held, device)
            held = batch
    if held is not None:
        if not len(held.images):
            raise InputError(f"data.on_error: no picture can be read; the first is {held.unreadable[0]}.")
        yield _to_device(held, device)


def _to_device(batch: Batch, device: torch.device) -> Batch:
    *tensors, unreadable = batch
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors), unreadable)


def _errors_in_one_line(loader: DataLoader) -> Iterator[Batch]:
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
