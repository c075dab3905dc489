"""Class folders, tar files, WebDataset shards and Hugging Face datasets: the same pictures by every way."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from classification.config import AugmentationConfig, DataConfig
from classification.data.loading import batches, eval_loader, open_data, train_loader
from classification.data.pictures import Pictures, Unreadable
from classification.data.readers import ReaderShards, index_classes
from hvt_backbones import InputError
from hvt_backbones.model_file import Preprocessing

from .conftest import open_at

CPU = torch.device("cpu")
PLAIN = Preprocessing(input_size=(3, 24, 24), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0).transform()


def pictures(path: str | Path, **settings: object) -> Pictures:
    return open_at(path, settings.pop("transform", PLAIN), **settings)


def contents(data: Pictures) -> set[tuple[str, bytes]]:
    """(class name, pixels) of every picture."""
    return {
        (data.class_names[sample.target], sample.image.numpy().tobytes())
        for sample in (data[i] for i in range(len(data)))
    }


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def tar_of_folders(data: Path, root: Path, split: str) -> None:
    write_tar(root / f"{split}.tar", {f"./{split}/{name}": content for name, content in tree(data / split).items()})


def tars_of_folders(data: Path, root: Path, split: str) -> None:
    files = list(tree(data / split).items())
    for shard in range(2):
        write_tar(root / split / f"{shard}.tar", dict(files[shard::2]))


def tar_per_class(data: Path, root: Path, split: str) -> None:
    for folder in (data / split).iterdir():
        write_tar(root / split / f"{folder.name}.tar", tree(folder))


def tar_of_tars(data: Path, root: Path, split: str) -> None:
    """As ILSVRC2012_img_train.tar."""
    inner = {
        f"{folder.name}.tar": write_tar(root / f"{folder.name}.tar", tree(folder)).read_bytes()
        for folder in (data / split).iterdir()
    }
    for name in inner:
        (root / name).unlink()
    write_tar(root / f"{split}.tar", inner)


def wds(sidecar: Callable[[str, int], dict[str, bytes]]) -> Callable[[Path, Path, str], None]:
    """Shards whose samples have the files that `sidecar(class, index)` makes, in a layout that differs by split."""

    def write(data: Path, root: Path, split: str) -> None:
        files = list(tree(data / split).items())
        for shard in range(2):
            members = {}
            for number, (name, content) in enumerate(files[shard::2]):
                label = Path(name).parent.name
                key = f"{label}/{shard}{number:04d}" if sidecar is class_in_key else f"{shard}{number:04d}"
                members |= {f"{key}.png": content}
                members |= {
                    f"{key}.{suffix}": text for suffix, text in sidecar(label, ["bright", "dark"].index(label)).items()
                }
            path = root / split / f"{shard:03d}.tar" if split == "train" else root / f"small-{split}-{shard:03d}.tar"
            write_tar(path, members)

    return write


def class_in_key(name: str, index: int) -> dict[str, bytes]:
    return {"txt": b"a caption"}


LAYOUTS = {
    "tar of folders": ("tar", tar_of_folders),
    "tars of folders": ("tar", tars_of_folders),
    "tar per class": ("tar", tar_per_class),
    "tar of tars": ("tar", tar_of_tars),
    "wds, class in key": ("wds", wds(class_in_key)),
    "wds, index in cls": ("wds", wds(lambda name, index: {"cls": f"{index}\n".encode()})),
    "wds, name in cls": ("wds", wds(lambda name, index: {"cls": name.encode(), "json": b"{}"})),
    "wds, index in json": ("wds", wds(lambda name, index: {"json": json.dumps({"label": index}).encode()})),
    "wds, name in json": ("wds", wds(lambda name, index: {"json": json.dumps({"class": name}).encode()})),
}


@pytest.mark.parametrize(("kind", "write"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_has_the_pictures_and_classes_of_the_folders(
    small_data: Path, tmp_path: Path, kind: str, write: Callable[[Path, Path, str], None]
) -> None:
    root = tmp_path / "packed"
    for split in ("train", "val"):
        write(small_data, root, split)
    config = DataConfig(kind=kind, dir=str(root), input_size=(3, 24, 24), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    train, val = open_data(config, AugmentationConfig())
    train.transform = val.transform = PLAIN
    train.crop = None
    named = train.class_names == ["bright", "dark"]
    assert named or train.class_names == ["0", "1"]
    for data, split in ((train, "train"), (val, "val")):
        if not named:
            data.use_classes(["bright", "dark"], "the model")
        folders = pictures(small_data / split)
        assert contents(data) == contents(folders)
        assert len(data) == len(folders) == len(contents(folders))
        assert data.class_counts().tolist() == folders.class_counts().tolist()
        assert all(".tar: " in data.filename(index) for index in range(len(data)))


def test_shards_serve_many_workers_and_a_main_process_that_read_before(small_data: Path, tmp_path: Path) -> None:
    """A position belongs to a read and not to a file that forked processes share."""
    tar_per_class(small_data, tmp_path, "train")
    data = pictures(tmp_path, split="train", kind="tar")
    expected = [data[index].image for index in range(12)]
    for _ in range(3):
        found = list(batches(eval_loader(data, 1, 2, rank=0, world=1, pin=False), CPU))
        assert torch.equal(torch.cat([batch.images for batch in found]), torch.stack(expected))
    assert {os.lseek(file, 0, os.SEEK_CUR) for file in data.reader._open.values()} == {0}
    copied = pickle.loads(pickle.dumps(data.reader))
    assert copied[3][0].read() == data.reader[3][0].read()


def test_a_thousand_shards_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReaderShards, "MAX_OPEN", 3)
    for shard in range(20):
        write_tar(tmp_path / f"{shard}.tar", {f"a/{shard}.png": f"picture {shard}".encode()})
    reader = ReaderShards(sorted(tmp_path.iterdir()), webdataset=False)
    before = len(os.listdir("/proc/self/fd"))
    texts = {reader[index][0].read() for index in [*range(20), *range(20)]}
    assert texts == {f"picture {shard}".encode() for shard in range(20)}
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_the_order_of_shards_and_classes_is_that_of_their_numbers(tmp_path: Path) -> None:
    for shard in (10, 9, 1):
        write_tar(tmp_path / f"{shard}.tar", {f"{label}/{shard}.png": b"x" for label in (11, 2, 10)})
    data = pictures(tmp_path, kind="tar")
    assert data.class_names == ["2", "10", "11"]
    names = [Path(data.filename(index).split(": ")[0]).stem for index in range(len(data))]
    assert names == ["1"] * 3 + ["9"] * 3 + ["10"] * 3


def test_classes_are_in_the_same_order_in_every_process() -> None:
    assert (
        list(index_classes(["b", "A", "a", "B"])) == list(index_classes(["B", "a", "A", "b"])) == ["A", "a", "B", "b"]
    )
    assert list(index_classes([str(index) for index in range(1000)])) == [str(index) for index in range(1000)]


def saved_together(data: Path, root: Path, cache: Path) -> None:
    datasets.load_dataset(str(data), cache_dir=str(cache)).save_to_disk(str(root))


def saved_apart(data: Path, root: Path, cache: Path) -> None:
    loaded = datasets.load_dataset(str(data), cache_dir=str(cache))
    loaded["train"].save_to_disk(str(root / "train"))
    loaded["validation"].save_to_disk(str(root / "val"))


def parquet(data: Path, root: Path, cache: Path) -> None:
    """As most datasets of the Hub lie there: the files' bytes within the table."""
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [(path, ["bright", "dark"].index(path.parent.name)) for path in sorted((data / split).rglob("*.png"))]
        features = datasets.Features({"img": datasets.Image(), "cls": datasets.ClassLabel(names=["bright", "dark"])})
        columns = {
            "img": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows],
            "cls": [row[1] for row in rows],
        }
        root.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(str(root / f"{name}-00000-of-00001.parquet"))


def folders(data: Path, root: Path, cache: Path) -> None:
    shutil.copytree(data, root)


@pytest.fixture
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("write", [saved_together, saved_apart, parquet, folders])
def test_hugging_face_datasets_have_the_pictures_of_the_folders(
    small_data: Path, tmp_path: Path, write: Callable[[Path, Path, Path], None], hugging_face_cache: Path
) -> None:
    root = tmp_path / "hf"
    write(small_data, root, hugging_face_cache)
    for split in ("train", "val"):
        data = pictures(root, split=split, kind="hfds")
        expected = pictures(small_data / split)
        assert data.class_names == expected.class_names
        assert contents(data) == contents(expected)
        assert data.class_counts().tolist() == expected.class_counts().tolist()
    for workers in (0, 2) if write in (saved_together, parquet) else (0,):
        found = list(batches(eval_loader(data, 4, workers, rank=0, world=1, pin=False), CPU))
        assert sum(len(batch.images) for batch in found) == 6
    assert "0.png" in " ".join(data.filename(index) for index in range(len(data)))


def test_workers_of_hugging_face_datasets_are_started_afresh(
    small_data: Path, tmp_path: Path, hugging_face_cache: Path
) -> None:
    """Forked, they now and then wait for ever for threads of Arrow that they do not have."""

    def start_method(root: Path, kind: str) -> str | None:
        config = DataConfig(kind=kind, dir=str(root), input_size=(3, 24, 24), batch_size=4, workers=1)
        train, val = open_data(config, AugmentationConfig())
        loaders = (
            train_loader(train, config, seed=0, rank=0, world=1, pin=False),
            eval_loader(val, 4, 1, rank=0, world=1, pin=False),
        )
        contexts = [loader.multiprocessing_context for loader in loaders]
        first, second = (None if context is None else context.get_start_method() for context in contexts)
        assert first == second
        return first

    saved_together(small_data, tmp_path / "hf", hugging_face_cache)
    assert start_method(tmp_path / "hf", "hfds") == "spawn"
    assert start_method(small_data, "imagefolder") is None  # the platform's own
    assert start_method(tmp_path, "synthetic") is None


@pytest.mark.slow
def test_hugging_face_faults(small_data: Path, tmp_path: Path, hugging_face_cache: Path) -> None:
    def refused(path: Path, match: str, split: str | None = "train") -> None:
        with pytest.raises(InputError, match=match) as error:
            pictures(path, split=split, kind="hfds")
        assert len(str(error.value).splitlines()) == 1

    refused(tmp_path / "nowhere", r"data\.dir: .*nowhere cannot be opened")
    refused(Path("nobody/nothing"), r"data\.dir: nobody/nothing cannot be opened")
    refused(small_data, "has the splits train, validation; name one instead of test", "test")
    refused(small_data, "has the splits train, validation; name one", None)
    single = datasets.load_dataset(str(small_data), cache_dir=str(hugging_face_cache))["train"]
    single.save_to_disk(str(tmp_path / "single"))
    refused(tmp_path / "single", "is a single saved split")
    assert len(pictures(tmp_path / "single", kind="hfds")) == 12
    for name, columns, match in (
        ("plain", {"image": single["image"][:2], "text": ["a", "b"]}, "needs one column of class labels"),
        ("text", {"label": ["a", "b"]}, "needs one column of pictures, called image; it has label"),
    ):
        datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / name))
        refused(tmp_path / name, match, None)
    unlabelled = datasets.Dataset.from_dict({"image": single["image"][:2], "label": [-1, -1]}, features=single.features)
    unlabelled.save_to_disk(str(tmp_path / "unlabelled"))
    refused(tmp_path / "unlabelled", "has pictures without labels", None)


def test_hugging_face_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"data\.kind: hfds needs .*pip install datasets"):
        pictures(tmp_path, kind="hfds")


def test_folder_faults(small_data: Path, tmp_path: Path) -> None:
    train = small_data / "train"
    with pytest.raises(InputError, match="does not exist"):
        pictures(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no pictures"):
        pictures(tmp_path / "empty")
    (train / "grey").mkdir()
    (train / "grey" / "notes.txt").write_text("soon")
    data = pictures(train)  # whether a class may be empty is for training to say
    assert (data.class_names, data.classes_without_pictures()) == (["bright", "dark", "grey"], ["grey"])
    (train / "0.png").touch()
    (train / "grey" / "notes.txt").unlink()
    (train / "grey").rmdir()
    with pytest.raises(InputError, match="lie in no class"):
        pictures(train)


def test_a_class_is_the_first_folder_and_hidden_ones_are_none(small_data: Path) -> None:
    train = small_data / "train"
    for name in ("bright", "dark"):
        (train / name / "more").mkdir()
        (train / name / "0.png").rename(train / name / "more" / "0.png")
    (train / ".thumbnails").mkdir()
    shutil.copy(train / "dark" / "1.png", train / ".thumbnails" / "1.png")
    (train / "dark" / "._1.png").write_bytes(b"of the Finder")
    data = pictures(train)
    assert data.class_names == ["bright", "dark"]
    assert data.class_counts().tolist() == [6, 6]
    assert len(contents(data)) == 12


def test_shard_faults(small_data: Path, tmp_path: Path) -> None:
    def refused(match: str, kind: str = "tar", split: str | None = None) -> None:
        with pytest.raises(InputError, match=match) as error:
            pictures(root, split=split, kind=kind)
        assert len(str(error.value).splitlines()) == 1

    root = tmp_path / "shards"
    refused("holds no tar files for train", split="train")
    root.mkdir()
    refused(r"holds no tar files for it; expected .*shards/\*\.tar")
    picture = (small_data / "val" / "dark" / "0.png").read_bytes()
    shard = write_tar(root / "a.tar", {"0.png": picture})
    refused(r"a\.tar: 0\.png lies in no class folder")
    refused(r"sample .*a\.tar: 0 has no class", "wds")
    write_tar(shard, {"notes.txt": b"soon"})
    refused("hold no pictures")
    for content, match in (
        ({"0.cls": b""}, "has no class"),
        ({"0.json": b"[1"}, r"its \.json is no JSON"),
        ({"0.json": b'{"caption": "dark"}'}, "label, cls, class, target"),
        ({"0.json": b'{"label": 0.5}'}, "has no class"),
        ({"0.json": b'{"label": -1}'}, "class -1 is not an index"),
        ({"0.cls": b"99999999999"}, "class 99999999999 is not an index"),
        ({"0.cls": b"1", "1.png": picture, "1.cls": b"dark"}, "as an index, others as a name"),
    ):
        write_tar(shard, {"0.png": picture} | content)
        refused(match, "wds")
    write_tar(shard, {"a/0.png": picture, "a/1.png": b""})
    refused(r"a\.tar: a/1\.png is empty \(0 bytes\)")
    with tarfile.open(shard, "w:gz") as archive:
        archive.add(small_data, "data")
    refused(r"a\.tar cannot be read as a tar file without compression")
    write_tar(shard, {"a/0.png": picture * 50})
    shard.write_bytes(shard.read_bytes()[:1000])
    refused(r"a\.tar cannot be read as a tar file")


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("imagefolder", "zero bytes"), ("tar", "half a jpeg"), ("wds", "no picture"), ("wds", "zero bytes")],
)
def test_damaged_pictures_are_named_or_counted_wherever_they_lie(
    small_data: Path, tmp_path: Path, kind: str, fault: str
) -> None:
    noise = io.BytesIO()
    image = torch.randint(256, (60, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(image.numpy()).save(noise, "jpeg")
    content = {"zero bytes": b"", "half a jpeg": noise.getvalue()[:2000], "no picture": b"GIF?" * 99}[fault]
    (small_data / "train" / "dark" / "2.png").unlink()
    (small_data / "train" / "dark" / "2.jpg").write_bytes(content)
    root = small_data
    if kind != "imagefolder":
        root = tmp_path / "packed"
        files = {str(path.relative_to(small_data)): path.read_bytes() for path in sorted(small_data.rglob("?.*"))}
        for split in ("train", "val"):
            write_tar(root / f"{split}.tar", {name: data for name, data in files.items() if name.startswith(split)})
    config = DataConfig(kind=kind, dir=str(root), input_size=(3, 16, 16), batch_size=11, workers=0)

    def read_all(config: DataConfig) -> None:
        train, _ = open_data(config, AugmentationConfig())
        list(batches(train_loader(train, config, seed=0, rank=0, world=1, pin=False), CPU))

    with pytest.raises(InputError, match=r"dark/2\.jpg (cannot be read|is empty)") as error:
        read_all(replace(config, batch_size=12))
    assert ("is empty (0 bytes)" in str(error.value)) == (fault == "zero bytes")

    config = replace(config, on_error="skip", max_errors=0.1)
    train, _ = open_data(config, AugmentationConfig())
    unreadable = Unreadable(train)
    loader = train_loader(train, config, seed=0, rank=0, world=1, pin=False)
    for epoch in range(4):  # each leaves one picture out
        loader.batch_sampler.set_position(epoch, 0)
        for batch in batches(loader, CPU):
            assert len(batch.images) == 11
            unreadable.add(batch.unreadable)
    (name,) = unreadable.names
    assert name.endswith("dark/2.jpg")
    evaluated = list(batches(eval_loader(train, 5, 0, rank=0, world=1, pin=False), CPU))
    assert sum(len(batch.images) for batch in evaluated) == 11


def write_mnist(folder: Path, split: str, images: np.ndarray, labels: np.ndarray, *, packed: bool) -> None:
    folder.mkdir(exist_ok=True)
    for what, numbers in (("images-idx3", images), ("labels-idx1", labels)):
        lengths = b"".join(length.to_bytes(4, "big") for length in numbers.shape)
        content = bytes([0, 0, 8, numbers.ndim]) + lengths + numbers.astype(np.uint8).tobytes()
        name = f"{split}-{what}-ubyte"
        (folder / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_the_files_of_mnist(packed: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, 28, 28)), np.arange(12) % 3
    write_mnist(tmp_path, "train", images, labels, packed=packed)
    write_mnist(tmp_path, "t10k", images[:6] // 2, labels[:6], packed=packed)
    config = DataConfig(kind="mnist", dir=str(tmp_path), input_size=(1, 28, 28), mean=(0.0,), std=(1.0,), crop_pct=1.0)
    train, val = open_data(config, AugmentationConfig())
    train.transform = val.transform = lambda picture: torch.from_numpy(np.array(picture))[None]
    train.crop = None
    assert train.class_names == val.class_names == ["0", "1", "2"]
    for data, expected in ((train, images), (val, images[:6] // 2)):
        assert [data[index].target for index in range(len(data))] == labels[: len(expected)].tolist()
        shown = torch.stack([data[index].image for index in range(len(data))])
        assert torch.equal(shown[:, 0].int(), torch.tensor(expected).int())
    assert train.filename(7).endswith("train-images-idx3-ubyte: picture 7")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "holds no t10k-labels-idx1-ubyte or "),
        (lambda folder: (folder / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\10\3"), "is no idx file of 3 axes"),
        (
            lambda folder: (folder / "train-labels-idx1-ubyte").rename(folder / "t10k-labels-idx1-ubyte"),
            "holds no train",
        ),
    ],
    ids=["missing", "cut", "of training"],
)
def test_files_of_mnist_that_cannot_be(spoil: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    for split in ("train", "t10k"):
        write_mnist(tmp_path, split, np.zeros((4, 28, 28)), np.arange(4), packed=False)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message):
        open_data(DataConfig(kind="mnist", dir=str(tmp_path)), AugmentationConfig())


def test_a_share_of_the_training_pictures_is_of_every_class_and_always_the_same(small_data: Path) -> None:
    def drawn(share: float, seed: int) -> list[str]:
        config = DataConfig(dir=str(small_data), train_share=share, input_size=(3, 24, 24))
        train, val = open_data(config, AugmentationConfig(), seed)
        assert len(val) == 6
        assert [train[index].target for index in range(len(train))] == train.reader.targets.tolist()
        return [train.filename(index) for index in range(len(train))]

    half = drawn(0.5, 0)
    assert half == drawn(0.5, 0)
    assert half != drawn(0.5, 1)
    assert [Path(name).parent.name for name in half] == ["bright"] * 3 + ["dark"] * 3
    assert len(drawn(0.01, 0)) == 2  # at least one of each
