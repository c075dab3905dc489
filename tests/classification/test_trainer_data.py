"""The digits on the disk, ImageFolders and their faults, and who sees which picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from classification.config import DataConfig
from classification.data import PictureFolder, RankSlice, batches, check_classes, preprocessing, train_loader
from classification.digits import lay_out_digits
from hvt_backbones import InputError


def as_tensor(size: tuple[int, ...] = (3, 32, 32)) -> object:
    mean, std = (0.0,) * size[0], (1.0,) * size[0]
    return preprocessing(DataConfig(input_size=size, mean=mean, std=std, crop_pct=1.0)).transform()


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def test_digits_are_complete_stratified_and_always_the_same(digits: Path, tmp_path: Path) -> None:
    train = PictureFolder(digits / "train", channels=3, transform=as_tensor())
    val = PictureFolder(digits / "val", channels=3, transform=as_tensor())
    assert (len(train), len(val)) == (1198, 599)
    assert train.class_names == val.class_names == [str(digit) for digit in range(10)]
    for label in range(10):
        share = sum(target == label for _, target in val.reader.samples) / 599
        whole = sum(target == label for _, target in train.reader.samples + val.reader.samples) / 1797
        assert abs(share - whole) < 0.002
    names = {path.name for path in digits.rglob("*.png")}
    assert len(names) == 1797  # a scan's number: no scan is in both parts
    assert tree_hash(lay_out_digits(tmp_path / "again")) == tree_hash(digits)
    image, target = train[0]
    assert image.shape == (3, 32, 32)
    assert (target, image.min().item()) == (0, 0.0)


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


def test_folder_faults(small_data: Path, tmp_path: Path) -> None:
    train = small_data / "train"
    with pytest.raises(InputError, match="does not exist"):
        PictureFolder(tmp_path / "nowhere", channels=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no pictures"):
        PictureFolder(tmp_path / "empty", channels=3)
    (train / "grey").mkdir()
    (train / "grey" / "notes.txt").write_text("soon")
    with pytest.raises(InputError, match="grey holds no pictures"):
        PictureFolder(train, channels=3)
    (train / "grey" / "0.png").touch()
    with pytest.raises(InputError, match=r"0\.png is empty \(0 bytes\)"):
        PictureFolder(train, channels=3)
    (train / "grey" / "0.png").rename(train / "0.png")
    (train / "grey" / "notes.txt").unlink()
    (train / "grey").rmdir()
    with pytest.raises(InputError, match="lie in no class"):
        PictureFolder(train, channels=3)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_picture_is_named_and_never_replaced(small_data: Path, workers: int) -> None:
    victim = small_data / "train" / "dark" / "3.png"
    victim.write_bytes(victim.read_bytes()[:50])
    data = PictureFolder(small_data / "train", channels=3, transform=as_tensor())
    with pytest.raises(InputError) as error:
        list(batches(DataLoader(data, 4, num_workers=workers), torch.device("cpu")))
    assert str(victim) in str(error.value)
    assert "Traceback" not in str(error.value)


def test_grey_models_read_grey(small_data: Path) -> None:
    data = PictureFolder(small_data / "val", channels=1, transform=as_tensor((1, 16, 16)))
    assert data[0][0].shape == (1, 16, 16)


def test_class_lists_are_compared_by_name() -> None:
    check_classes(["a", "b"], ["a", "b"], "train", "val")
    with pytest.raises(InputError, match="b, c only in train; d only in val"):
        check_classes(["a", "b", "c"], ["a", "d"], "train", "val")


@pytest.mark.parametrize(("length", "world"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_shares_are_exact(length: int, world: int) -> None:
    shares = [list(RankSlice(length, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(RankSlice(length, rank, world)) for rank in range(world)] == [len(share) for share in shares]


def test_training_order_follows_seed_and_epoch(small_data: Path) -> None:
    data = PictureFolder(small_data / "train", channels=3, transform=as_tensor())
    config = DataConfig(batch_size=2, workers=0)

    def order(seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
        loader = train_loader(data, config, seed=seed, rank=rank, world=world, pin=False)
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    assert sorted(order(0, 1, 0, 2) + order(0, 1, 1, 2)) == list(range(12))
