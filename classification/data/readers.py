"""Where pictures lie: class folders, tar files, WebDataset shards, Hugging Face datasets.

Every reader is random access: that is what an exact resume without a replay needs.
"""

from __future__ import annotations

import glob
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from hvt_backbones import InputError
from hvt_backbones.images import IMAGE_SUFFIXES

EXPECTED_FOLDERS = "expected one sub-folder of pictures per class"


def index_classes(names: Iterable[str]) -> dict[str, int]:
    """Class name -> index, numbers within the names by value: 9 before 10, as ImageNet-V2's folders need."""
    return {name: index for index, name in enumerate(sorted(set(names), key=lambda name: (natural_key(name), name)))}


class Reader:
    """Pictures by index.

    Attributes:
        class_to_idx: names of the classes, in the order of their indices.
        targets: the class of each picture.
        empty: the class folders without pictures, which count as classes all the same.
        forks: whether forked workers may read them.
    """

    class_to_idx: dict[str, int]
    targets: Sequence[int] | NDArray[np.int64]
    empty: Sequence[str] = ()
    forks = True

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        """The open file and the class of a picture."""
        raise NotImplementedError

    def filename(self, index: int) -> str:
        """How a message names the picture: its path, or its shard and the name therein."""
        raise NotImplementedError

    def check_sizes(self) -> None:
        """`InputError` for the first picture of zero bytes, where that is known without a look at each file."""


class ReaderShare(Reader):
    """A share of each class's pictures of another reader, at least one, drawn by `seed`."""

    def __init__(self, reader: Reader, share: float, seed: int) -> None:
        targets, generator = np.asarray(reader.targets), np.random.default_rng(seed)
        drawn = [
            generator.permutation(members)[: max(1, round(share * len(members)))]
            for members in (np.flatnonzero(targets == label) for label in np.unique(targets))
        ]
        self.reader, self.indices = reader, np.sort(np.concatenate(drawn))
        self.targets = targets[self.indices]
        self.class_to_idx, self.empty, self.forks = reader.class_to_idx, reader.empty, reader.forks

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.reader[int(self.indices[index])]

    def filename(self, index: int) -> str:
        return self.reader.filename(int(self.indices[index]))


class ReaderFolder(Reader):
    """`folder/CLASS/**/*.jpg`, links followed, where the class is the first folder and not, as timm has it, the last.

    Pictures are in the order of their paths, the same on every machine; hidden files and folders are none.

    Raises:
        InputError: no such folder; no pictures at all; or pictures outside of a class.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"data folder {folder} does not exist or is not a folder; {EXPECTED_FOLDERS}.")
        found, _ = find_images_and_targets(str(folder), types=IMAGE_SUFFIXES, sort=False)
        if not found:
            raise InputError(f"data folder {folder} holds no pictures; {EXPECTED_FOLDERS}.")
        prefix = len(os.path.join(str(folder), ""))
        self.paths = sorted(path for path, _ in found if not _is_hidden(path[prefix:]))
        labels = [path[prefix:].partition(os.sep) for path in self.paths]
        if any(not separator for _, separator, _ in labels):
            raise InputError(f"data folder {folder} has pictures that lie in no class; {EXPECTED_FOLDERS}.")
        named = {name for name, _, _ in labels}
        children = (child for child in sorted(folder.iterdir()) if not child.name.startswith("."))
        self.empty = [child.name for child in children if child.is_dir() and child.name not in named]
        self.class_to_idx = index_classes([*named, *self.empty])
        self.targets = [self.class_to_idx[name] for name, _, _ in labels]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open(self.paths[index], "rb"), self.targets[index]

    def filename(self, index: int) -> str:
        return self.paths[index]


def _is_hidden(path: str) -> bool:
    return path.startswith(".") or f"{os.sep}." in path


class ReaderShards(Reader):
    """Pictures in tar files, as class folders or as WebDataset samples, by random access.

    timm's ReaderWds streams: it cannot say which picture comes next without reading those before, so that a resumed
    run would have to replay them, and every number of workers and processes has an order of its own. timm's
    ReaderImageInTar is random access, but reads each tar whole to list it, orders equal paths as the file system does,
    and shares the offset of an open file with forked workers. This one lists the members once, by their headers alone
    (about a minute for a million members, in every process), and reads a picture by its position, which no two
    processes can disturb.

    Args:
        shards: tar files, not compressed.
        webdataset: the files of a sample share their name up to the first dot; its class stands in `.cls` (an index or
            a name), in `.json` (under one of `LABEL_FIELDS`), or is the folder in the name. Else the class is the
            folder that a picture lies in, or the tar file where it lies in none; a tar may hold further ones.

    Raises:
        InputError: a shard that is damaged, compressed or not a tar file; no pictures; a picture without a class.
    """

    LABEL_FIELDS = ("label", "cls", "class", "target")
    MAX_OPEN = 64  # shards; a process may open about a thousand files
    MAX_LABEL = 10**6

    def __init__(self, shards: Sequence[Path], *, webdataset: bool) -> None:
        self.shards = [str(shard) for shard in shards]
        self._open: dict[int, int] = {}
        find = self._find_samples if webdataset else self._find_pictures
        found = [(number, *sample) for number in range(len(shards)) for sample in find(number)]
        if not found:
            raise InputError(f"data folder {shards[0].parent}: the tar files ({shards[0].name}, ...) hold no pictures.")
        numbers, self.members, offsets, sizes, labels = zip(*found, strict=True)
        self.class_to_idx = self._number_labels(labels)
        # arrays: reading one does not touch reference counts, so that forked workers go on sharing the memory
        self.numbers, self.offsets, self.sizes = np.array(numbers), np.array(offsets), np.array(sizes)
        self.targets = np.array([self.class_to_idx[str(label)] for label in labels])

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        number, offset, size = int(self.numbers[index]), int(self.offsets[index]), int(self.sizes[index])
        return io.BytesIO(self._read(number, offset, size)), int(self.targets[index])

    def filename(self, index: int) -> str:
        return f"{self.shards[self.numbers[index]]}: {self.members[index]}"

    def check_sizes(self) -> None:
        if len(empty := np.flatnonzero(self.sizes == 0)):
            raise InputError(f"picture {self.filename(empty[0])} is empty (0 bytes); replace or delete it.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if number not in self._open:
            if len(self._open) >= self.MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[number] = os.open(self.shards[number], os.O_RDONLY)
        # has no offset that processes share, unlike seek and read
        return os.pread(self._open[number], size, offset)

    def _find_pictures(self, number: int) -> Iterator[tuple[str, int, int, str]]:
        """(member, offset, size, class) of the pictures of a shard of class folders."""
        # the only tar there is stands for the whole data, else each may stand for a class
        whole = os.path.splitext(os.path.basename(self.shards[number]))[0] if len(self.shards) > 1 else ""
        for name, offset, size in self._list(number, nested=True):
            if name.lower().endswith(IMAGE_SUFFIXES):
                label = os.path.basename(os.path.dirname(os.path.normpath(name))) or whole
                if not label:
                    raise InputError(f"picture {self.shards[number]}: {name} lies in no class folder; put it into one.")
                yield name, offset, size, label

    def _find_samples(self, number: int) -> Iterator[tuple[str, int, int, str | int]]:
        """(member, offset, size, class) of the pictures of a WebDataset shard."""
        samples: dict[str, dict[str, tuple[str, int, int]]] = {}
        for name, offset, size in self._list(number, nested=False):
            folder, base = os.path.split(os.path.normpath(name))
            stem, _, suffix = base.partition(".")
            samples.setdefault(os.path.join(folder, stem), {})[f".{suffix.lower()}"] = (name, offset, size)
        for key, files in samples.items():
            picture = next((files[suffix] for suffix in (".jpg", *IMAGE_SUFFIXES) if suffix in files), None)
            if picture is not None:
                yield *picture, self._label(number, key, files)

    def _label(self, number: int, key: str, files: Mapping[str, tuple[str, int, int]]) -> str | int:
        where = f"sample {self.shards[number]}: {key}"
        if ".cls" in files:
            text = self._read(number, *files[".cls"][1:]).decode("utf-8", "replace").strip()
            label: Any = int(text) if text.isdecimal() else text
        elif ".json" in files:
            try:
                fields = json.loads(self._read(number, *files[".json"][1:]))
                label = next(fields[field] for field in self.LABEL_FIELDS if field in fields)
            except (ValueError, TypeError, StopIteration):
                raise InputError(
                    f"{where}: its .json is no JSON mapping with one of {', '.join(self.LABEL_FIELDS)}."
                ) from None
        else:
            label = os.path.basename(os.path.dirname(key))
        if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
            raise InputError(f"{where} has no class: expected .cls, .json with a label, or a folder in its name.")
        if isinstance(label, int) and not 0 <= label < self.MAX_LABEL:
            raise InputError(f"{where}: its class {label} is not an index from 0 to {self.MAX_LABEL - 1}.")
        return label

    @staticmethod
    def _number_labels(labels: Sequence[str | int]) -> dict[str, int]:
        indices = {label for label in labels if isinstance(label, int)}
        names = {label for label in labels if isinstance(label, str)}
        if not names:  # indices as they are; one that no picture has still counts
            return {str(index): index for index in range(max(indices) + 1)}
        if not indices:
            return index_classes(names)
        raise InputError("data.dir: some samples give their class as an index, others as a name; use one way.")

    def _list(self, number: int, nested: bool) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of the files of a shard; those of tar files within it too where `nested`."""
        try:
            with tarfile.open(self.shards[number], "r:") as archive:
                yield from _list_archive(archive, "", 0, nested)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(
                f"shard {self.shards[number]} cannot be read as a tar file without compression ({error}); pack or copy "
                "it again."
            ) from None


def _list_archive(archive: tarfile.TarFile, folder: str, start: int, nested: bool) -> Iterator[tuple[str, int, int]]:
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all: gigabytes for a million
        base = os.path.basename(member.name)
        if not member.isreg() or member.issparse() or base.startswith("."):
            continue
        offset = start + member.offset_data
        if nested and base.lower().endswith(".tar"):
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                yield from _list_archive(inner, os.path.join(folder, base[: -len(".tar")]), offset, nested)
        else:
            yield os.path.join(folder, member.name), offset, member.size


def find_shards(root: Path, split: str | None) -> list[Path]:
    """`root`, or its split: a tar file, the tar files of a folder, or the files `*SPLIT-*.tar` of the root.

    Raises:
        InputError: there are none.
    """
    path = root if split is None else root / split
    if split is not None and not path.exists():
        single = root / f"{split}.tar"
        found = [single] if single.is_file() else list(root.glob(f"*{glob.escape(split)}-*.tar"))
        expected = f"expected {path}/*.tar, {single} or {root}/*{split}-*.tar"
    else:
        found = [path] if path.is_file() else list(path.glob("*.tar"))
        expected = f"expected {path}/*.tar"
    if not found:
        raise InputError(f"data folder {root} holds no tar files for {split or 'it'}; {expected}.")
    return sorted(found, key=lambda path: (natural_key(path.name), path.name))


class ReaderHuggingFace(Reader):
    """A Hugging Face dataset: saved with `save_to_disk`, a folder that `datasets` can load, or a name on the Hub.

    timm's ReaderHfds opens no saved ones, wants the columns' names, and lets labels of -1 pass; hence our own.

    Args:
        name: folder or name.
        split: of it; None where there is only one. What we call `val` is often `validation` there.

    Raises:
        InputError: `datasets` is missing; no such dataset or split; it has no picture or class column; no labels.
    """

    # Arrow's threads do not outlive a fork, and now and then the worker does not either; one that is started afresh
    # maps the same files
    forks = False

    def __init__(self, name: str, split: str | None) -> None:
        try:
            import datasets
        except ImportError:
            raise InputError("data.kind: hfds needs Hugging Face datasets; run `pip install datasets`.") from None
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        self.where = name if split is None else f"{name} [{split}]"
        dataset = _open_hugging_face(datasets, name, split)
        self.image_key = self._column(dataset, datasets.Image, ("image", "img", "jpg", "png"), "pictures")
        label_key = self._column(dataset, datasets.ClassLabel, ("label", "labels", "cls"), "class labels")
        self.class_to_idx = {name: index for index, name in enumerate(dataset.features[label_key].names)}
        targets = dataset.select_columns([label_key]).with_format("numpy")[:][label_key]
        if len(dataset) == 0 or targets.min() < 0:
            raise InputError(
                f"data.dir: {self.where} has {'pictures without labels' if len(dataset) else 'no pictures'}."
            )
        self.targets = targets
        self.dataset = dataset.select_columns([self.image_key]).cast_column(
            self.image_key, datasets.Image(decode=False)
        )

    def _column(self, dataset: Any, kind: type, usual: Sequence[str], what: str) -> str:
        found = [key for key, feature in dataset.features.items() if isinstance(feature, kind)]
        named = [key for key in usual if key in found] or found
        if not named or (len(found) > 1 and named is found):
            raise InputError(
                f"data.dir: {self.where} needs one column of {what}, called {usual[0]}; it has "
                f"{', '.join(found or dataset.features)}."
            )
        return named[0]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        picture = self.dataset[int(index)][self.image_key]
        if picture["bytes"] is not None:
            return io.BytesIO(picture["bytes"]), int(self.targets[index])
        return open(picture["path"], "rb"), int(self.targets[index])

    def filename(self, index: int) -> str:
        path = (self.dataset[int(index)][self.image_key] or {}).get("path")
        if path and os.path.isfile(path):
            return path
        return f"{self.where}: row {index}{f' ({path})' if path else ''}"


def _open_hugging_face(datasets: Any, name: str, split: str | None) -> Any:
    wanted = (split, "validation") if split == "val" else (split,)
    saved = next((folder for folder in (Path(name, split or ""), Path(name)) if _is_saved(folder)), None)
    try:
        opened = datasets.load_dataset(name) if saved is None else datasets.load_from_disk(str(saved))
    except Exception as error:  # of the many formats' own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"data.dir: {name} cannot be opened as a Hugging Face dataset ({reason}).") from None
    if not isinstance(opened, dict):  # one split, saved alone
        if saved == Path(name, split or ""):
            return opened
        raise InputError(f"data.dir: {name} is a single saved split; expected {name}/{split}, or both saved together.")
    found = [key for key in wanted if key in opened] or (list(opened) if split is None and len(opened) == 1 else [])
    if not found:
        raise InputError(f"data.dir: {name} has the splits {', '.join(opened)}; name one instead of {split}.")
    return opened[found[0]]


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
