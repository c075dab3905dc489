"""Pictures decoded and augmented one by one: the same tensor for the same seed, and an answer to damaged files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hvt_backbones import InputError
from hvt_backbones.images import bearable
from hvt_backbones.images import decode as _decode
from hvt_backbones.predict import class_positions

from . import patches as patches  # a worker that starts afresh unpickles the data set, hence imports this module
from .crop import RandomCrop
from .finish import Finish
from .readers import Reader

OnError = Literal["fail", "skip"]


class PictureError(InputError):
    """A picture that cannot be read; the message names it."""


@dataclass(frozen=True)
class Sample:
    """One picture: its (C, H, W) bytes (None where it is left out), class, index, the seed of what is random about it
    (outside of training its index), and the pictures passed over for it.
    """

    image: Tensor | None
    target: int
    index: int
    seed: int
    unreadable: list[str]


class Pictures(Dataset):
    """Pictures of a reader, decoded and transformed.

    `pictures[index]` is for evaluation. `pictures[index, seed]` is for training: what the transform draws from the
    generators of Python, NumPy and torch depends on the seed alone, and leaves them as they were.

    Args:
        reader: where the pictures lie (readers.py).
        channels: 3 reads pictures as RGB, 1 as grey.
        transform: from a PIL picture to a tensor (C, H, W), of bytes or ready for the model.
        crop: reads of each picture no more than a random crop; None reads it whole.
        finish: what is left to do with bytes on the device.
        on_error: at a picture that cannot be read, "fail" raises `PictureError`. With "skip" the sample names it: in
            training the next readable picture takes its place, in evaluation it is left out.
        max_errors: largest share of unreadable pictures that "skip" bears.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        channels: int,
        transform: Any,
        crop: RandomCrop | None = None,
        finish: Finish | None = None,
        on_error: OnError = "fail",
        max_errors: float = 0.01,
    ) -> None:
        self.reader = reader
        self.channels = channels
        self.transform = transform
        self.crop = crop
        self.finish = finish
        self.on_error = on_error
        self.max_unreadable = bearable(max_errors, len(reader))
        self.class_names = list(reader.class_to_idx)
        self.class_order = list(range(len(self.class_names)))  # class of the reader -> class of the model
        self.forks = reader.forks

    def __len__(self) -> int:
        return len(self.reader)

    def filename(self, index: int) -> str:
        """How a message names the picture: its path, or its shard and the name therein."""
        return self.reader.filename(index)

    def class_counts(self) -> NDArray[np.int64]:
        """Pictures of each class, (number of classes,)."""
        targets = np.asarray(self.class_order)[np.asarray(self.reader.targets, dtype=np.int64)]
        return np.bincount(targets, minlength=len(self.class_names))

    def classes_without_pictures(self) -> list[str]:
        """Their names."""
        return [name for name, count in zip(self.class_names, self.class_counts(), strict=True) if count == 0]

    def sort_as_text(self) -> None:
        """Number the classes by their names as text, 10 before 9, as torchvision does, instead of by value."""
        order = sorted(range(len(self.class_names)), key=self.class_names.__getitem__)
        self.class_order = np.argsort(order).tolist()
        self.class_names = [self.class_names[index] for index in order]

    def use_classes(self, names: Sequence[str], where: str) -> None:
        """Number the classes as a model with these `names` does, wherever the data has fewer or another order.

        Raises:
            InputError: the data has pictures of other classes; `where` says whose names they are.
        """
        own = list(self.reader.class_to_idx)
        used = set(np.unique(self.reader.targets).tolist())  # a class without pictures may be called as it likes
        position = class_positions(names, [name for index, name in enumerate(own) if index in used], where)
        self.class_order = [position.get(name, -1) for name in own]
        self.class_names = list(names)

    def use_numbers(self, numbers: Sequence[int], num_classes: int, where: str) -> None:
        """Class k of the data is class `numbers[k]` of a model with `num_classes`; `where` says whose the numbers are.

        Raises:
            InputError: another number of them than classes, one twice, or one that the model does not have.
        """
        if len(numbers) != len(self.class_names):
            raise InputError(
                f"{where} has {len(numbers)} lines, the data {len(self.class_names)} classes; expected one for each, "
                "in the order of the class folders."
            )
        for number in numbers:
            if not 0 <= number < num_classes or numbers.count(number) > 1:
                problem = "more than once" if 0 <= number < num_classes else f"of a model with {num_classes} classes"
                raise InputError(f"{where} has class {number} {problem}; expected different ones from 0.")
        self.class_order = [numbers[index] for index in self.class_order]
        names = dict(zip(numbers, self.class_names, strict=True))
        self.class_names = [names.get(index, str(index)) for index in range(num_classes)]

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[Sample]:
        """A batch, which is what loaders ask for: keeping and restoring the generators costs as much as a crop does."""
        with kept_generators():
            return [self._load(key, key, replace=False) if isinstance(key, int) else self._draw(*key) for key in keys]

    def _draw(self, index: int, seed: int) -> Sample:
        seed_generators(seed)
        return self._load(index, seed, replace=True)

    def _load(self, index: int, seed: int, *, replace: bool) -> Sample:
        """The sample of a picture, or, if that cannot be read and is to be replaced, of the next one that can."""
        unreadable: list[str] = []
        while True:
            try:
                image, target = self.load(index)
            except PictureError as error:
                if self.on_error == "fail":
                    raise
                unreadable.append(self.filename(index))
                if not replace:
                    return Sample(None, -1, index, seed, unreadable)
                if len(unreadable) > self.max_unreadable:
                    raise too_many_unreadable(unreadable, len(self), self.max_unreadable) from error
                index = (index + 1) % len(self)
            else:
                return Sample(image, target, index, seed, unreadable)

    def load(self, index: int) -> tuple[Tensor, int]:
        """The transformed picture and its class.

        Raises:
            PictureError: it cannot be read.
        """
        try:
            file, target = self.reader[index]
            with file:
                read = _decode if self.crop is None else self.crop.read
                picture = read(file, self.channels)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise at damaged bytes is beyond listing
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PictureError(
                f"picture {self.filename(index)} cannot be read ({reason}): replace it or leave it out, or set "
                "data.on_error = skip"
            ) from None
        return self.transform(picture), self.class_order[target]


@contextmanager
def kept_generators() -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators are afterwards as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from it
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_generators(seed: int) -> None:
    """Python's, NumPy's and torch's CPU generators start from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too


class Noise(Pictures):
    """Constant noise per index without decoding, to measure how fast a device trains; classes follow the index."""

    forks = True
    POOL = 4096  # different pictures: windows at successive offsets into one piece of noise

    def __init__(self, images: int, classes: int, input_size: tuple[int, ...]) -> None:
        self.images = images
        self.input_size = input_size
        self.on_error, self.max_unreadable = "fail", 0
        self.class_names = [str(index) for index in range(classes)]
        size = int(np.prod(input_size)) + self.POOL
        self.noise = torch.randn(size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.images

    def classes_without_pictures(self) -> list[str]:
        return []

    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount(np.arange(self.images) % len(self.class_names), minlength=len(self.class_names))

    def filename(self, index: int) -> str:
        return f"synthetic picture {index}"

    def load(self, index: int) -> tuple[Tensor, int]:
        start = index % self.POOL
        window = self.noise[start : start + int(np.prod(self.input_size))]
        return window.view(self.input_size), index % len(self.class_names)


class Unreadable:
    """The pictures that `data.on_error = skip` passed over.

    Args:
        dataset: the pictures, which say how many may be unreadable.

    Attributes:
        names: of the pictures, each once.
    """

    def __init__(self, dataset: Pictures) -> None:
        self.length = len(dataset)
        self.limit = dataset.max_unreadable
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Count these, once each, whether this rank met them or another.

        Raises:
            InputError: that are more than `data.max_errors` of the pictures.
        """
        self.names.update(names)
        if len(self.names) > self.limit:
            raise too_many_unreadable(sorted(self.names), self.length, self.limit)

    def gather(self) -> list[str]:
        """The names that any process has passed over, which then all count; a collective call."""
        self.add(gather_object(sorted(self.names)))
        return sorted(self.names)


def too_many_unreadable(names: Sequence[str], length: int, limit: int) -> InputError:
    return InputError(
        f"data.max_errors: {len(names)} of {length} pictures cannot be read, {limit} are allowed; the last is "
        f"{names[-1]}. Replace them, or raise data.max_errors."
    )
