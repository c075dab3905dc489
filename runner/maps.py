"""Maps of segmentation: read for what their numbers mean, or refused with the file and the number."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmengine.fileio import get

from hvt_backbones.errors import InputError
from hvt_backbones.images import open_picture
from hvt_backbones.weights.report import some

from .findings import UNREADABLE, Findings, Kind, describe, picture_sizes

IGNORED, NUMBERS, UNKNOWN = 255, 256, -1
BITS = 0x0102  # a tag of TIFF: of each channel
CHANNELS = Kind("map of several channels", "write one channel, in which each pixel is the number of its class")
NUMBER = Kind(
    "number that is of no class", "number the classes as metainfo.classes does, and write 255 for what is of none"
)
SIZE = Kind("map of another size than its picture", "draw the map at the picture's size, pixel by pixel")
GREY = Kind("grey map written in colours", "their one value is read", wrong=False)
EMPTY = Kind("map of nothing but ignored pixels", "nothing is learned from it, and nothing counted", wrong=False)
ONE_CLASS = Kind(
    "one class at most", "number the classes from 0, with reduce_zero_label from 1; 255 is none", wrong=False
)
NEVER = Kind("class that never occurs", "it is not learned, or not in the mean IoU", wrong=False)


@dataclass(frozen=True)
class Numbers:
    """What the numbers in maps mean.

    Attributes:
        classes: how many there are before `label_map`; None if the data set does not say.
        reduce_zero_label: 0 is of no class, 1 the first one.
        label_map: (class in the map, class of the model) where only some are taken.
        ignore_index: what the data set calls of no class, beside 255.
        backend: that decodes, of MMCV.
    """

    classes: int | None
    reduce_zero_label: bool = False
    label_map: tuple[tuple[int, int], ...] = ()
    ignore_index: int = IGNORED
    backend: str = "pillow"

    @functools.cached_property
    def table(self) -> np.ndarray:
        """(256,) the label of each number: of a class, 255 for what is of none, or -1 for what is refused."""
        labels = np.arange(NUMBERS)
        if self.reduce_zero_label:
            labels[1:] -= 1
            labels[0] = labels[IGNORED] = IGNORED
        if self.classes is not None:
            allowed = (labels < self.classes) | (labels == IGNORED) | (labels == self.ignore_index)
            labels[~allowed] = UNKNOWN
        taken = labels.copy()
        for old, new in self.label_map:
            taken[labels == old] = new
        return taken

    def labels(self, numbers: np.ndarray, name: str) -> np.ndarray:
        """The labels, (H, W) uint8.

        Raises:
            InputError: a number that is of no class.
        """
        if unknown := self.unknown(numbers):
            raise InputError(f"{name} {unknown}: {NUMBER.remedy}")
        return self.table[numbers].astype(np.uint8)

    def unknown(self, numbers: np.ndarray) -> str | None:
        """The numbers that are of no class, in words."""
        if numbers.size and numbers.min() >= 0 and numbers.max() < NUMBERS:
            if self.table.min() >= 0:
                return None
            present = np.flatnonzero(np.bincount(numbers.ravel(), minlength=NUMBERS))
        else:
            present = np.unique(numbers)
        odd = [str(n) for n in present.tolist() if not 0 <= n < NUMBERS or self.table[n] == UNKNOWN]
        if not odd:
            return None
        first = int(self.reduce_zero_label)
        last = "" if self.classes is None else f" to {self.classes - 1 + first}"
        return f"holds {some(odd)}; the classes are {first}{last}"


def readers_of(dataset: Any) -> list[Any]:
    """The steps of a pipeline that read maps as it is done here; others have formats of their own."""
    from mmseg.datasets.transforms import LoadAnnotations

    load = LoadAnnotations._load_seg_map
    return [step for step in dataset.pipeline.transforms if getattr(type(step), "_load_seg_map", None) is load]


def numbers_of(dataset: Any) -> Numbers:
    """What a data set of mmsegmentation says about its maps, and how its pipeline reads them."""
    classes, label_map = dataset.metainfo.get("classes"), dataset.label_map
    readers = readers_of(dataset)
    return Numbers(
        classes=len(label_map) if label_map else len(classes) if classes else None,
        reduce_zero_label=bool(dataset.reduce_zero_label),
        label_map=tuple((label_map or {}).items()),
        ignore_index=dataset.ignore_index,
        backend=readers[0].imdecode_backend if readers else "pillow",
    )


def decode(content: bytes, backend: str, name: str) -> tuple[np.ndarray, bool]:
    """The numbers of a map as they are in the file, (H, W), and whether they were written as grey in several channels.

    Raises:
        InputError: the channels differ, or hold no whole numbers.
    """
    import mmcv

    pixels = mmcv.imfrombytes(content, flag="unchanged", backend=backend)
    bits, channels = _stored(content)
    if channels > 1 and bits > 8 and pixels.dtype == np.uint8:  # Pillow leaves out the lower ones
        raise InputError(f"{name} has {channels} channels of {bits} bits: {CHANNELS.remedy}")
    if bits in (2, 4):
        pixels = pixels // (255 // (2**bits - 1))  # as grey they were stretched to white
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    grey = pixels.ndim == 3
    if grey:
        count = pixels.shape[-1]
        colours, alpha = (pixels[..., :-1], pixels[..., -1]) if count in (2, 4) else (pixels, None)
        if alpha is not None and (alpha.min() < alpha.max() or not alpha.any()):
            raise InputError(f"{name} has {count} channels with an alpha that differs: {CHANNELS.remedy}")
        if (colours != colours[..., :1]).any():
            raise InputError(f"{name} has {count} channels that differ: {CHANNELS.remedy}")
        pixels = colours[..., 0]
    if pixels.dtype.kind not in "iu":  # black and white, or the numbers of a TIFF
        whole = pixels.astype(np.int64)
        if (whole != pixels).any():
            raise InputError(f"{name} holds numbers that are no whole ones: {NUMBER.remedy}")
        pixels = whole
    return pixels, grey


def _stored(content: bytes) -> tuple[int, int]:
    """Bits of a number and channels, as a PNG or a TIFF of several channels is stored; (8, 1) of all others."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        bits, kind = content[24:26]
        return (8, 1) if kind == 3 else (bits, {2: 3, 4: 2, 6: 4}.get(kind, 1))  # 3 has a palette
    if content.startswith((b"II*\0", b"MM\0*")):
        with contextlib.suppress(OSError), open_picture(io.BytesIO(content)) as picture:
            bits = picture.tag_v2.get(BITS, (8,))
            return (max(bits), len(bits)) if len(bits) > 1 else (8, 1)
    return 8, 1


@dataclass
class Inspected:
    """
    Attributes:
        problems: what is odd about one map.
        pixels: of each label, (256,); None if the map cannot be read.
    """

    problems: list[tuple[Kind, str]]
    pixels: np.ndarray | None = None


def inspect(pair: tuple[str, str], numbers: Numbers, *, whole: bool = False) -> Inspected:
    """Read a map and the size of its picture.

    Args:
        pair: the files of the picture and of the map.
        whole: decode the picture too.
    """
    picture, path = pair
    found = Inspected([])
    try:
        with open(path, "rb") as file:
            pixels, grey = decode(file.read(), numbers.backend, path)
    except InputError as error:
        found.problems.append((CHANNELS, str(error).removesuffix(f": {CHANNELS.remedy}")))
        return found
    except FileNotFoundError:
        found.problems.append((UNREADABLE, f"{path} does not exist"))
        return found
    except Exception as error:  # OpenCV, Pillow and tifffile have many
        found.problems.append((UNREADABLE, f"{path} cannot be read ({describe(error)})"))
        return found
    if grey:
        found.problems.append((GREY, f"{path} has channels that are equal"))
    try:
        sizes = picture_sizes(picture, whole=whole)
        if pixels.shape not in sizes:
            height, width = min(sizes)
            said = f"{path} is {pixels.shape[0]} x {pixels.shape[1]} pixels, its picture {picture} {height} x {width}"
            found.problems.append((SIZE, said))
    except OSError as error:
        if whole or isinstance(error, FileNotFoundError):  # else the pipeline's reader may know it
            found.problems.append((UNREADABLE, f"{picture} cannot be read ({error.strerror or error})"))
    if unknown := numbers.unknown(pixels):
        found.problems.append((NUMBER, f"{path} {unknown}"))
        pixels = pixels[(pixels >= 0) & (pixels < NUMBERS)]
    labels = numbers.table[pixels]
    found.pixels = np.bincount(labels[labels >= 0], minlength=NUMBERS)
    if not found.problems and found.pixels[IGNORED] == labels.size:
        found.problems.append((EMPTY, f"{path} holds nothing but ignored pixels"))
    return found


def gather(findings: Findings, maps: Iterable[Inspected], classes: Sequence[str], total: int) -> dict[str, int]:
    """Add what was found in maps, of `total` that there are. Returns in how many of them each class is."""
    counts, count = np.zeros(NUMBERS, np.int64), 0
    for one in maps:
        count += 1
        for kind, what in one.problems:
            findings.add(kind, what)
        if one.pixels is not None:
            counts += one.pixels > 0
    named = dict(zip(classes, counts.tolist(), strict=False))
    lacking = [name for name, number in named.items() if not number]
    if findings.wrong or not lacking:
        return named
    if len(named) - len(lacking) < 2 <= len(named):
        only = next((name for name, number in named.items() if number), "none")
        ignored = f", and 255 in {counts[IGNORED]}" if counts[IGNORED] else ""
        findings.add(ONE_CLASS, f"in {count} maps the class {only} occurs{ignored}, never {some(lacking)}")
    elif count == total:
        findings.add(NEVER, f"{len(lacking)} of {len(named)} classes never occur, {some(lacking)}")
    return named


def get_data_info(method: Callable[..., dict[str, Any]], dataset: Any, index: int) -> dict[str, Any]:
    """In place of `BaseSegDataset.get_data_info`: a sample says what the numbers in its map mean."""
    return {**method(dataset, index), "numbers": numbers_of(dataset)}


def load_seg_map(method: Callable[..., None], reader: Any, results: dict[str, Any]) -> None:
    """In place of mmsegmentation's `LoadAnnotations._load_seg_map`: read a map for what its numbers mean, or refuse."""
    path, reduce = results["seg_map_path"], bool(results.get("reduce_zero_label", reader.reduce_zero_label))
    if reader.reduce_zero_label not in (None, reduce):
        raise InputError(
            f"reduce_zero_label is {reduce} for the data set and {reader.reduce_zero_label} for its "
            "LoadAnnotations: leave it out of the pipeline"
        )
    label_map = tuple((results.get("label_map") or {}).items())
    numbers = results.get("numbers") or Numbers(None, reduce, label_map)
    pixels, _ = decode(get(path, backend_args=reader.backend_args), reader.imdecode_backend, path)
    size = tuple(results.get("ori_shape", pixels.shape)[:2])
    if pixels.shape != size:
        raise InputError(
            f"{path} is {pixels.shape[0]} x {pixels.shape[1]} pixels, its picture {results['img_path']} "
            f"{size[0]} x {size[1]}: {SIZE.remedy}"
        )
    results["gt_seg_map"] = numbers.labels(pixels, path)
    results["seg_fields"].append("gt_seg_map")
