"""Pictures decoded and augmented one by one: the same tensor for the same seed, and an answer to damaged files."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import Dataset

from hvt_backbones import InputError
from hvt_backbones.predict import PICTURE_MODES

OnError = Literal["fail", "skip"]


class PictureError(InputError):
    """A picture that cannot be read; the message names it."""


class Sample(NamedTuple):
    """One picture: its tensor (None where it is left out), class, index, and the pictures passed over for it."""

    image: Tensor | None
    target: int
    index: int
    unreadable: list[str]


class Pictures(Dataset):
    """Pictures of a reader, decoded and transformed.

    `pictures[index]` is for evaluation. `pictures[index, seed]` is for training: what the transform draws from the
    generators of Python, NumPy and torch depends on the seed alone, and leaves them as they were.

    Args:
        reader: where the pictures lie (readers.py).
        channels: 3 reads pictures as RGB, 1 as grey.
        transform: from a PIL picture to a tensor (C, H, W).
        on_error: at a picture that cannot be read, "fail" raises `PictureError`. With "skip" the sample names it: in
            training the next readable picture takes its place, in evaluation it is left out.
        max_errors: largest share of unreadable pictures that "skip" bears.
    """

    def __init__(
        self, reader: Reader, *, channels: int, transform: Any, on_error: OnError = "fail", max_errors: float = 0.01
    ) -> None:
        self.reader = reader
        self.channels = channels
        self.transform = transform
        self.on_error = on_error
        self.max_unreadable = int(max_errors * len(reader) + 1e-9)  # 0.29 * 100 is a little less than 29
        self.class_names: list[str] = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        self.class_order: list[int] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def forks(self) -> bool:
        """Whether forked workers may read the pictures."""
        return getattr(self.reader, "forks", True)  # timm's readers do not say so, and may

    def filename(self, index: int) -> str:
        """How a message names the picture: its path, or its shard and the name therein."""
        return self.reader.filename(index)

    def class_counts(self) -> np.ndarray:
        """Pictures of each class, (number of classes,)."""
        counts = np.bincount(self.reader.targets, minlength=len(self.class_names))
        return counts if self.class_order is None else counts[np.argsort(self.class_order)]

    def use_classes(self, names: Sequence[str], where: str) -> None:
        """Number the classes as a model with these `names` does, wherever the data has them in another order.

        Raises:
            InputError: the data has other classes; `where` says whose names they are.
        """
        check_classes(names, self.class_names, where, "the data")
        if set(names) == set(self.class_names):  # else the data's are numbers, which mean the model's order
            position = {name: index for index, name in enumerate(names)}
            self.class_order = [position[name] for name in self.class_names]
        self.class_names = list(names)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        if isinstance(key, tuple):
            index, seed = key
            with seeded_generators(seed):
                return self._load_from(index)
        try:
            image, target = self.load(key)
        except PictureError:
            if self.on_error == "fail":
                raise
            return Sample(None, -1, key, [self.filename(key)])
        return Sample(image, target, key, [])

    def _load_from(self, index: int) -> Sample:
        unreadable: list[str] = []
        while True:
            try:
                image, target = self.load(index)
            except PictureError as error:
                if self.on_error == "fail":
                    raise
                unreadable.append(self.filename(index))
                if len(unreadable) > self.max_unreadable:
                    raise too_many_unreadable(unreadable, len(self), self.max_unreadable) from error
                index = (index + 1) % len(self)
            else:
                return Sample(image, target, index, unreadable)

    def load(self, index: int) -> tuple[Tensor, int]:
        """The transformed picture and its class.

        Raises:
            PictureError: it cannot be read.
        """
        try:
            file, target = self.reader[index]
            with file:
                picture = _decode(file, self.channels)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise at damaged bytes is beyond listing
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PictureError(
                f"picture {self.filename(index)} cannot be read ({reason}): replace it or leave it out, or set "
                "data.on_error = skip"
            ) from None
        return self.transform(picture), target if self.class_order is None else self.class_order[target]


def _decode(file: Any, channels: int) -> Image.Image:
    # libraries switch this on for the whole process; half of a picture would then pass for one, its rest grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if not file.read(1):
        raise ValueError("it is empty (0 bytes)")
    file.seek(0)
    with Image.open(file) as picture:
        return ImageOps.exif_transpose(picture).convert(PICTURE_MODES[channels])


@contextmanager
def seeded_generators(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators start from `seed` within, and are as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm draws from it
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class Noise(Pictures):
    """Constant noise per index without decoding, to measure how fast a device trains; classes follow the index."""

    forks = True
    POOL = 4096  # different pictures: windows at successive offsets into one piece of noise

    def __init__(self, images: int, classes: int, input_size: tuple[int, ...], seed: int = 0) -> None:
        self.images = images
        self.input_size = input_size
        self.on_error, self.max_unreadable = "fail", 0
        self.class_names = [str(index) for index in range(classes)]
        size = int(np.prod(input_size)) + self.POOL
        self.noise = torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self.images

    def class_counts(self) -> np.ndarray:
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


def too_many_unreadable(names: Sequence[str], length: int, limit: int) -> InputError:
    return InputError(
        f"data.max_errors: {len(names)} of {length} pictures cannot be read, {limit} are allowed; the last is "
        f"{names[-1]}. Replace them, or raise data.max_errors."
    )


def check_classes(expected: Sequence[str], found: Sequence[str], expected_where: str, found_where: str) -> None:
    """`InputError`, with the first few names, where two lists of classes differ.

    Folders that are numbered from 0 on, as ImageNet-V2's, stand for as many classes of any names in their order.
    """
    if len(expected) == len(found) and list(found) == [str(index) for index in range(len(found))]:
        return
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        parts = [
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} only in {where}"
            for names, where in ((missing, expected_where), (extra, found_where))
            if names
        ]
        raise InputError(f"the classes differ: {'; '.join(parts)}. Both need the same class folders.")
