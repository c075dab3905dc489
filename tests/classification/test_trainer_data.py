"""The digits on the disk, pictures and their faults, augmentation that repeats itself, and worker processes."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from classification.config import AugmentationConfig, DataConfig
from classification.data.digits import lay_out_digits
from classification.data.loading import Batch, batches, eval_loader, open_data, preprocessing, train_loader
from classification.data.pictures import Pictures, Unreadable, class_positions
from hvt_backbones import InputError
from hvt_backbones.predict import class_names as imagenet_names

from .conftest import open_at

CPU = torch.device("cpu")
STRONG = AugmentationConfig(auto_augment="rand-m9-n3-mstd0.5-inc1", random_erasing=0.6)  # draws from all generators


def as_tensor(size: tuple[int, ...] = (3, 32, 32)) -> object:
    mean, std = (0.0,) * size[0], (1.0,) * size[0]
    return preprocessing(DataConfig(input_size=size, mean=mean, std=std, crop_pct=1.0)).transform()


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def test_digits_are_complete_stratified_and_always_the_same(digits: Path, tmp_path: Path) -> None:
    train = open_at(digits / "train", as_tensor())
    val = open_at(digits / "val", as_tensor())
    assert (len(train), len(val)) == (1198, 599)
    assert train.class_names == val.class_names == [str(digit) for digit in range(10)]
    for label in range(10):
        share = val.class_counts()[label] / 599
        whole = (train.class_counts() + val.class_counts())[label] / 1797
        assert abs(share - whole) < 0.002
    names = {path.name for path in digits.rglob("*.png")}
    assert len(names) == 1797  # a scan's number: no scan is in both parts
    assert tree_hash(lay_out_digits(tmp_path / "again")) == tree_hash(digits)
    first = train[0]
    assert (first.index, first.unreadable) == (0, [])
    assert first.image.shape == (3, 32, 32)
    assert (first.target, first.image.min().item()) == (0, 0.0)


def test_digits_show_the_scan(digits: Path) -> None:
    """Shrunk back to 8x8, the picture is the scan of its number."""
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    for path in sorted((digits / "val").glob("*/*.png"))[::60]:
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((32, 32), "L")
            small = torch.tensor(list(picture.resize((8, 8), Image.Resampling.BOX).tobytes())).double()
        scan = torch.tensor(scans[int(path.stem)])
        assert labels[int(path.stem)] == int(path.parent.name)
        assert torch.corrcoef(torch.stack([small, scan]))[0, 1] > 0.97


def test_digits_are_not_mixed_into_another_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a layout of the digits"):
        lay_out_digits(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match=r"data\.dir"):
        lay_out_digits(tmp_path / "mine.txt" / "digits")


def test_a_failed_layout_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        lay_out_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(small_data: Path) -> Path:
    """`small_data` with pictures 0.png and 3.png of train/dark damaged: one of zero bytes, one cut in half."""
    dark = small_data / "train" / "dark"
    dark.joinpath("0.png").write_bytes(b"")
    dark.joinpath("3.png").write_bytes(dark.joinpath("3.png").read_bytes()[:50])
    return small_data


def photo(size: int = 96) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def folder_config(root: Path, **settings: object) -> DataConfig:
    return DataConfig(**{"dir": str(root), "input_size": (3, 16, 16), "batch_size": 4, "workers": 0} | settings)


def loader_of(config: DataConfig, seed: int = 0, rank: int = 0, world: int = 1) -> DataLoader:
    train, _ = open_data(config, STRONG)
    return train_loader(train, config, seed=seed, rank=rank, world=world, pin=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_picture_is_named_and_never_replaced(damaged: Path, workers: int) -> None:
    (damaged / "train" / "dark" / "0.png").unlink()
    data = open_at(damaged / "train", as_tensor())
    with pytest.raises(InputError) as error:
        list(batches(eval_loader(data, 4, workers, rank=0, world=1, pin=False), CPU))
    victim = damaged / "train" / "dark" / "3.png"
    assert str(error.value).startswith(f"picture {victim} cannot be read (")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_are_counted_and_left_out_of_evaluation(damaged: Path, workers: int) -> None:
    data = open_at(damaged / "train", as_tensor(), on_error="skip", max_errors=0.2)
    for world in (1, 2, 5):
        shares = [
            list(batches(eval_loader(data, 1, workers, rank=rank, world=world, pin=False), CPU))
            for rank in range(world)
        ]
        found = [batch for share in shares for batch in share]
        assert all(len(batch.images) == len(batch.targets) == len(batch.indices) == 1 for batch in found)
        assert sorted(index for batch in found for index in batch.indices.tolist()) == [*range(6), 7, 8, 10, 11]
        names = [Path(name).name for batch in found for name in batch.unreadable]
        assert sorted(names) == ["0.png", "3.png"]


def test_a_skipped_training_picture_gives_way_to_the_next_readable_one(damaged: Path) -> None:
    config = folder_config(damaged, on_error="skip", max_errors=0.2, batch_size=12)
    batch = next(batches(loader_of(config), CPU))
    assert len(batch.images) == 12
    assert sorted(batch.indices.tolist()) == [0, 1, 2, 3, 4, 5, 7, 7, 8, 10, 10, 11]
    assert batch.targets.tolist() == [int(index >= 6) for index in batch.indices]
    assert sorted(Path(name).name for name in batch.unreadable) == ["0.png", "3.png"]
    again = next(batches(loader_of(replace(config, workers=2)), CPU))
    assert torch.equal(batch.images, again.images)


def test_more_unreadable_pictures_than_the_stated_share_end_the_run(damaged: Path) -> None:
    data = open_at(damaged / "train", as_tensor(), on_error="skip", max_errors=0.1)
    unreadable = Unreadable(data)  # 12 pictures: 1 is allowed
    unreadable.add(["a.png"])
    unreadable.add(["a.png"])
    assert unreadable.names == {"a.png"}
    with pytest.raises(InputError, match=r"data\.max_errors: 2 of 12 pictures cannot be read, 1 are allowed.*b\.png"):
        unreadable.add(["b.png"])
    data.reader.targets *= 25
    assert Pictures(data.reader, channels=3, transform=None, max_errors=0.29).max_unreadable == 87  # of 300


def test_nothing_but_damage_ends_at_once(small_data: Path) -> None:
    for path in small_data.rglob("*.png"):
        path.write_bytes(b"no picture")
    config = folder_config(small_data, on_error="skip", max_errors=0.5)
    with pytest.raises(InputError, match=r"data\.max_errors: 7 of 12"):
        next(batches(loader_of(config), CPU))
    _, val = open_data(config, STRONG)
    with pytest.raises(InputError, match="no picture can be read"):
        list(batches(eval_loader(val, 4, 0, rank=0, world=1, pin=False), CPU))


def test_a_jpeg_without_its_end_is_an_error_and_not_a_grey_picture(
    small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_data / "val" / "dark" / "0.jpg"
    photo().save(path, quality=90)
    path.write_bytes(path.read_bytes()[: int(0.99 * path.stat().st_size)])
    data = open_at(small_data / "val", as_tensor())
    index = [data.filename(index) for index in range(len(data))].index(str(path))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some libraries do when they are imported
    with pytest.raises(InputError, match=r"0\.jpg cannot be read"):
        data[index]


def test_grey_models_read_grey(small_data: Path) -> None:
    data = open_at(small_data / "val", as_tensor((1, 16, 16)), channels=1)
    assert data[0].image.shape == (1, 16, 16)


SYNSETS = imagenet_names(1000)  # the descriptions of ImageNet's classes


@pytest.mark.parametrize(
    ("names", "found", "expected"),
    [
        (["a", "b", "c"], ["c", "a"], [2, 0]),
        (["a", "b", "c"], ["2", "01"], [2, 1]),
        (["001", "002", "010"], ["10", "1"], [2, 0]),  # both are numbers: by value
        (["10", "9"], ["9"], [1]),  # a name before an index
        (SYNSETS, ["n01498041", "n01531178"], [6, 11]),  # ImageNet-A's first: stingray, goldfinch
        ([str(index) for index in range(1000)], ["n01498041"], [6]),
        (["a", "b", "c"], ["a", "d"], "d only in the data, and unknown to the model .it has b, c without"),
        (["a", "b", "c"], ["1", "3"], "1, 3 only in the data"),
        ([str(number) for number in range(1, 11)], ["0", "1"], "the classes differ: 0 only in the data"),
        ([f"mine {index}" for index in range(1000)], ["n01498041"], "n01498041 only in the data"),
    ],
)
def test_classes_of_the_data_are_found_in_the_model(names: list[str], found: list[str], expected: object) -> None:
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            class_positions(names, found, "the model")
    else:
        assert class_positions(names, found, "the model") == dict(zip(found, expected, strict=True))


def numbered(root: Path, names: list[str]) -> Path:
    """One picture per class folder, whose grey value is its place in `names`."""
    for level, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(root / name / "0.png")
    return root


def levels(data: Pictures) -> dict[int, int]:
    """Target -> grey value of its picture."""
    return {sample.target: round(255 * sample.image.mean().item()) for sample in (data[i] for i in range(len(data)))}


def test_numeric_folders_are_classes_in_numeric_order(tmp_path: Path) -> None:
    """ImageNet-V2's folders: 10 is class 10, not the one after 1; and it stands for the model's class 10."""
    data = open_at(numbered(tmp_path, [str(index) for index in range(12)]), as_tensor((3, 8, 8)))
    assert data.class_names == [str(index) for index in range(12)]
    synsets = [f"n{1000 + index}" for index in range(12)]
    data.use_classes(synsets, "the model")
    assert data.class_names == synsets
    assert levels(data) == {index: index for index in range(12)}
    data.use_classes([f"m{index}" for index in range(13)], "the model")
    assert data.classes_without_pictures() == ["m12"]
    as_text = open_at(tmp_path, as_tensor((3, 8, 8)), class_order="text")
    assert as_text.class_names[:4] == ["0", "1", "10", "11"]
    assert levels(as_text) == {index: int(name) for index, name in enumerate(as_text.class_names)}


def test_classes_follow_the_names_of_a_model_with_another_order(tmp_path: Path) -> None:
    names = [str(index) for index in range(12)]
    data = open_at(numbered(tmp_path, names), as_tensor((3, 8, 8)))
    data.use_classes(sorted(names), "a model trained by a tool that sorts as text")
    assert levels(data) == {sorted(names).index(name): int(name) for name in names}
    assert data.class_counts().tolist() == [1] * 12


def test_training_and_evaluation_number_the_classes_alike(tmp_path: Path) -> None:
    numbered(tmp_path / "train", ["ant", "Bee", "cat", "bee"])
    numbered(tmp_path / "val", ["0", "1", "2", "3"])
    train, val = open_data(folder_config(tmp_path), STRONG)
    assert train.class_names == val.class_names == ["ant", "Bee", "bee", "cat"]
    shutil.rmtree(tmp_path / "val" / "1")
    (tmp_path / "val" / "2" / "0.png").unlink()
    train, val = open_data(folder_config(tmp_path), STRONG)
    assert val.classes_without_pictures() == ["Bee", "bee"]
    assert [val[index].target for index in range(len(val))] == [0, 3]
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(InputError, match="dog holds no pictures"):
        open_data(folder_config(tmp_path), STRONG)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
@pytest.mark.parametrize("kind", ["imagefolder", "synthetic"])
def test_batches_are_the_same_for_any_number_of_workers_and_processes(small_data: Path, kind: str) -> None:
    """Bit for bit, repeats of a picture included; one process with 8 pictures shows what two with 4 show."""
    config = folder_config(small_data, kind=kind, repeated_augmentation=2, synthetic_images=12, batch_size=4)

    def pictures(seed: int = 0, **settings: int) -> dict[int, torch.Tensor]:
        """Every picture of the first two steps of epoch 3, under the sum of its pixels."""
        world = settings.pop("world", 1)
        found: list[Batch] = []
        for rank in range(world):
            loader = loader_of(replace(config, **settings), seed, rank, world)
            loader.batch_sampler.set_position(3, 0)
            found += list(batches(loader, CPU))
        images = torch.cat([batch.images for batch in found])
        indices = torch.cat([batch.indices for batch in found])
        return images[torch.argsort(images.flatten(1).double().sum(1))], sorted(indices.tolist())

    expected = pictures()
    for settings in (
        {"workers": 1},
        {"workers": 3},
        {"world": 2, "batch_size": 2},
        {"world": 2, "batch_size": 2, "workers": 1},
    ):
        found = pictures(**settings)
        assert found[1] == expected[1]
        assert torch.equal(found[0], expected[0])
    assert not torch.equal(pictures(seed=1)[0], expected[0])
    if kind == "imagefolder":
        assert len({image.sum().item() for image in expected[0]}) == 12  # the second showing is another picture


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_generators_of_the_process_alone(small_data: Path, workers: int) -> None:
    loader = loader_of(folder_config(small_data, workers=workers))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    for epoch in range(2):
        loader.batch_sampler.set_position(epoch, 0)
        assert len(list(batches(loader, CPU))) == 3
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert after[0] == before[0]
    assert all(np.array_equal(left, right) for left, right in zip(after[1], before[1], strict=True))
    assert torch.equal(after[2], before[2])


def test_synthetic_pictures_are_constant_and_cheap() -> None:
    config = DataConfig(kind="synthetic", synthetic_images=50, synthetic_classes=7, input_size=(3, 32, 32))
    train, val = open_data(config, STRONG)
    assert (len(train), len(val), len(train.class_names)) == (50, 5, 7)
    assert [train[index].target for index in (0, 6, 7, 49)] == [0, 6, 0, 0]
    assert train.class_counts().tolist() == [8] + [7] * 6
    image = train[3].image
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    assert torch.equal(image, train[3, 99].image)
    assert not torch.equal(image, train[4].image)
    assert abs(image.mean()) < 0.1
    assert abs(image.std() - 1) < 0.1


def test_a_forgotten_loader_ends_its_workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cycle too, which the garbage collector takes apart in an order of its own."""
    config = DataConfig(kind="synthetic", synthetic_images=100, input_size=(3, 8, 8), batch_size=4, workers=2)
    train, _ = open_data(config, STRONG)
    loader = train_loader(train, config, seed=0, rank=0, world=1, pin=False)
    next(batches(loader, CPU))
    # how long PyTorch waits for each worker that was not told to end: longer than the busiest machine collects garbage
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 60.0)
    workers = [worker.pid for worker in loader._iterator._workers]
    cycle: list[object] = [loader]
    cycle.append(cycle)
    del loader, cycle
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 50
    assert gone(workers)


# A process without handlers of its own, as the commands that only read: it says which workers it has, and goes on.
LOAD_FOREVER = """
import sys, torch
from classification.config import AugmentationConfig, DataConfig
from classification.data.loading import batches, open_data, train_loader

config = DataConfig(kind="synthetic", synthetic_images=10**6, input_size=(3, 8, 8), batch_size=4, workers=2)
train, _ = open_data(config, AugmentationConfig())
loader = train_loader(train, config, seed=0, rank=0, world=1, pin=False)
try:
    for step, batch in enumerate(batches(loader, torch.device("cpu"))):
        if step == 3:
            print(*(worker.pid for worker in loader._iterator._workers), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_workers_leave_a_signal_to_the_main_process_and_do_not_outlive_it(number: signal.Signals, status: int) -> None:
    """Ctrl-C goes to all processes of a terminal, of which one answers; what kills, kills one."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore::UserWarning", "-c", LOAD_FOREVER], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        said = process.communicate(timeout=900)
        assert process.returncode == status
        assert said == ("", "") or number == signal.SIGKILL
        assert gone(workers)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_in_one_line(small_data: Path) -> None:
    data = open_at(small_data / "train", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"^data\.workers: a process that decodes pictures died .*shared memory"):
        list(batches(eval_loader(data, 4, 1, rank=0, world=1, pin=False), CPU))
