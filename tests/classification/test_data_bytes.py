"""Pictures as bytes: cropped, resized and augmented as timm does, normalised and erased where the batch has come to."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch.utils.data import DataLoader

from benchmarks.photographs import draw
from classification.config import AugmentationConfig, DataConfig
from classification.data.crop import RandomCrop
from classification.data.finish import Finish
from classification.data.loading import augmentations, batches, open_data, preprocessing, random_crop, train_loader
from classification.data.pictures import seed_generators
from classification.data.slides import Slidable
from hvt_backbones import InputError
from hvt_backbones.predict import image_batches

CPU = torch.device("cpu")
SIZE, SCALE, RATIO = (48, 56), (0.08, 1.0), (3 / 4, 4 / 3)
SEED = 2**61 + 5


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return draw(np.random.default_rng(0), 300, 220)


def encoded(picture: Image.Image, kind: str = "jpeg", **settings: object) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    file.seek(0)
    return file


def levels(left: object, right: object) -> np.ndarray:
    return np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_whole_picture_is_timms(photograph: Image.Image, interpolation: str, mode: str) -> None:
    """From the same draws: enlarged, shrunk, and not all of it."""
    picture = photograph.convert(mode)
    crop = RandomCrop((200, 210), SCALE, RATIO, interpolation)
    theirs = RandomResizedCropAndInterpolation((200, 210), SCALE, RATIO, interpolation)
    differences, to_pillow = [], []
    for seed in range(30):
        random.seed(seed)
        found = crop.read(encoded(picture, "png"), len(mode))
        random.seed(seed)
        expected = theirs(picture)
        assert (found.size, found.mode) == (expected.size, expected.mode)
        differences.append(levels(found, expected))
        random.seed(seed)
        part = picture.crop(crop.draw(picture))
        rows = part.resize((210, part.height), str_to_pil_interp(interpolation))
        to_pillow.append(levels(found, rows.resize((210, 200), str_to_pil_interp(interpolation))))
    assert np.mean(np.stack(to_pillow) > 1) < 2e-5
    assert np.max(to_pillow) <= 2
    # Pillow 13 takes columns before rows where that is quicker, which differs where colours are cut off between the two
    assert np.mean(np.stack(differences) > 1) < 0.01
    assert np.mean(differences) < 0.1


def test_no_more_of_a_jpeg_is_decoded_than_the_crop_needs(
    photograph: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, loaded, crop = encoded(photograph, quality=92), [], RandomCrop(SIZE, SCALE, RATIO, "bicubic")
    resize = RandomCrop.resize

    def watched(self: RandomCrop, picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        loaded.append((picture.size, box))
        return resize(self, picture, box)

    monkeypatch.setattr(RandomCrop, "resize", watched)
    whole = Image.open(encoded(photograph, quality=92)).convert("RGB")
    parts, means = [], []
    for seed in range(40):
        random.seed(seed)
        file.seek(0)
        found = crop.read(file, 3)
        random.seed(seed)
        drawn = crop.draw(whole)
        size, box = loaded[-1]
        part = round(300 / size[0])
        parts.append(part)
        assert size == (-(-300 // part), -(-220 // part))
        # at least as many pixels as are asked for, and not twice as many of each side
        shares = (drawn[2] - drawn[0]) / SIZE[1], (drawn[3] - drawn[1]) / SIZE[0]
        assert (part == 1) == (min(shares) < 2)
        assert part == 1 or part <= min(shares) < 2 * part
        assert all(abs(part * edge - asked) <= part / 2 for edge, asked in zip(box, drawn, strict=True))
        resized = whole.crop([part * edge for edge in box]).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        means.append(levels(found, resized).mean())
    assert {1, 2, 4} <= set(parts)
    assert np.mean(means) < 2  # of a picture so small, which has as much detail as one of seven times its size
    assert max(means) < 4


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (lambda picture: encoded(picture.convert("L")), 3),
        (lambda picture: encoded(picture), 1),
        (lambda picture: encoded(picture.convert("CMYK")), 3),
        (lambda picture: encoded(picture, "png"), 3),
        (lambda picture: encoded(picture.quantize(64), "png"), 3),
        (lambda picture: encoded(picture, exif=rotated()), 3),
    ],
    ids=["grey to colour", "colour to grey", "CMYK", "PNG", "palette", "on its side"],
)
def test_what_is_no_plain_jpeg_is_decoded_whole(photograph: Image.Image, make, channels: int) -> None:
    from hvt_backbones.images import decode

    file, asked = make(photograph), []
    whole = decode(file, channels)
    file.seek(0)
    same = decode(file, channels, part=asked.append)
    assert asked == []
    assert (same.mode, same.size, same.tobytes()) == (whole.mode, whole.size, whole.tobytes())


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_jpeg_that_ends_too_early_is_damaged_at_every_part(photograph: Image.Image, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "0.jpg").write_bytes(encoded(photograph).getvalue()[:-2000])
    config = DataConfig(dir=str(tmp_path), input_size=(3, 16, 16), batch_size=1, workers=0)
    train, _ = open_data(config, AugmentationConfig(scale=(1.0, 1.0)))
    with pytest.raises(InputError, match=r"0\.jpg cannot be read") as error:
        next(batches(train_loader(train, config, seed=0, rank=0, world=1, pin=False), CPU))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize(("kind", "axis"), [("shear", 0), ("shear", 1), ("move", 0), ("move", 1)])
def test_rows_and_columns_slide_as_pillow_moves_them(photograph: Image.Image, kind: str, axis: int) -> None:
    for amount in (-0.3, 0.27, 0.0, 40.0, -33.4, 0.5, 500.0):
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[{"shear": (1, 3), "move": (2, 5)}[kind][axis]] = amount
        settings = {"resample": Image.Resampling.BICUBIC, "fillcolor": (124, 116, 104)}
        expected = photograph.transform(photograph.size, Image.Transform.AFFINE, matrix, **settings)
        found = Slidable(photograph).transform(photograph.size, Image.Transform.AFFINE, tuple(matrix), **settings)
        assert levels(found, expected).max() <= 1
    grey = photograph.convert("L")
    settings = {"resample": Image.Resampling.BICUBIC, "fillcolor": 9}
    found = Slidable(grey).transform(grey.size, Image.Transform.AFFINE, tuple(matrix), **settings)
    assert found.tobytes() == grey.transform(grey.size, Image.Transform.AFFINE, matrix, **settings).tobytes()


def test_the_augmentations_are_timms_picture_by_picture(photograph: Image.Image) -> None:
    """One operation to a picture: a second one, such as equalising, makes more of a grey level."""
    config, policy = DataConfig(input_size=(3, 220, 220)), "rand-m9-n1-mstd0.5-inc1"
    picture = photograph.crop((0, 0, 220, 220))
    ours = augmentations(config, AugmentationConfig(auto_augment=policy))
    theirs = create_transform((3, 220, 220), is_training=True, auto_augment=policy, use_prefetcher=True)
    theirs.transforms[0] = lambda picture: picture  # the crop
    params = {"translate_const": 99, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    unpatched = rand_augment_transform(policy, params)
    for operation in unpatched.ops:
        operation.aug_fn = getattr(operation.aug_fn, "operation", operation.aug_fn)
    theirs.transforms[2] = unpatched
    changed = 0
    for seed in range(150):
        seed_generators(SEED + seed)
        found = ours(picture)
        seed_generators(SEED + seed)
        expected = torch.as_tensor(theirs(picture))
        assert levels(found, expected).max() <= 1
        changed += not np.array_equal(found, expected)
    assert changed < 60


def test_bytes_become_what_timm_makes_of_a_picture(photograph: Image.Image) -> None:
    image = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (image.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    found = Finish(mean, std)(image[None], [0])
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    assert torch.equal(found[0], expected)


def test_held_out_pictures_are_what_predict_sees(small_data: Path) -> None:
    config = DataConfig(dir=str(small_data), input_size=(3, 24, 24), batch_size=6, workers=0)
    _, val = open_data(config, AugmentationConfig(random_erasing=1.0))
    loader = DataLoader(val, 6, collate_fn=train_loader(val, config, seed=0, rank=0, world=1, pin=False).collate_fn)
    (batch,) = batches(loader, CPU)
    (expected,) = image_batches([Path(val.filename(index)) for index in range(6)], preprocessing(config), CPU)
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-6)


def test_a_quarter_of_the_bytes_is_sent(small_data: Path) -> None:
    config = DataConfig(dir=str(small_data), input_size=(3, 24, 24), batch_size=4, workers=0)
    train, _ = open_data(config, AugmentationConfig(random_erasing=1.0))
    loader = train_loader(train, config, seed=0, rank=0, world=1, pin=False)
    sent, arrived = next(iter(loader)), next(batches(loader, CPU))
    assert sent.images.shape == arrived.images.shape == (4, 3, 24, 24)
    assert 4 * sent.images.nbytes == arrived.images.nbytes
    assert arrived.images.dtype == torch.float32


SIDE = 64


def rectangles(image: torch.Tensor, before: float) -> tuple[int, int, int, int] | None:
    """What of an even picture is no longer so, as top, left, height and width."""
    rows, columns = ((image != before).any(0).any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        return None
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def test_pictures_are_erased_as_timm_erases_them() -> None:
    """As often, in rectangles of the same areas, proportions and places."""
    count = 3000
    finish = Finish((0.0,) * 3, (1.0,) * 3, erasing=0.6)
    ours = [
        rectangles(image, 1.0)
        for image in finish(torch.full((count, 3, SIDE, SIDE), 255, dtype=torch.uint8), range(count))
    ]
    random.seed(0)
    timm = RandomErasing(0.6, mode="pixel", device="cpu")
    theirs = [rectangles(timm(torch.ones(3, SIDE, SIDE)), 1.0) for _ in range(count)]
    assert [finish.rectangle(seed, SIDE, SIDE) for seed in range(count)] == ours
    shares = [sum(box is not None for box in found) / count for found in (ours, theirs)]
    assert shares[0] == pytest.approx(0.6, abs=0.03)
    assert shares[1] == pytest.approx(0.6, abs=0.03)
    left, right = (np.array([box for box in found if box is not None], dtype=float) for found in (ours, theirs))
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] / (SIDE - box[:, 2]),
        lambda box: box[:, 1] / (SIDE - box[:, 3]),
    ):
        one, two = np.sort(measure(left)), np.sort(measure(right))
        at = np.concatenate([one, two])
        gap = np.abs(np.searchsorted(one, at, "right") / len(one) - np.searchsorted(two, at, "right") / len(two)).max()
        assert gap < 1.63 * np.sqrt((len(one) + len(two)) / (len(one) * len(two)))  # Kolmogorov and Smirnov, 1 %


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_what_is_put_there_follows_from_the_seed_alone(mode: str) -> None:
    finish = Finish((0.5,) * 3, (0.25,) * 3, erasing=1.0, mode=mode)
    images = torch.full((4, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    seeds = [SEED, SEED + 1, SEED + 2, SEED + 3]
    state = torch.get_rng_state()
    together = finish(images, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    alone = torch.cat([finish(images[:1], [seed]) for seed in reversed(seeds)]).flip(0)
    assert torch.equal(together, alone)
    for image, seed in zip(together, seeds, strict=True):
        top, left, height, width = finish.rectangle(seed, SIDE, SIDE)
        inside = image[:, top : top + height, left : left + width]
        outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        outside[top : top + height, left : left + width] = False
        assert (image[:, outside] == 2).all()
        colours = [len(channel.unique()) for channel in inside]
        if mode == "const":
            assert (inside == 0).all()
        elif mode == "rand":
            assert colours == [1, 1, 1]
            assert len(inside.unique()) == 3
        else:
            assert min(colours) > 0.9 * height * width
            assert abs(inside.mean()) < 6 / inside.numel() ** 0.5
    assert torch.equal(finish(images, seeds), together)
    assert not torch.equal(finish(images, [seed + 9 for seed in seeds]), together)


def test_settings_of_the_recipe_reach_the_device(small_data: Path) -> None:
    config = DataConfig(dir=str(small_data), input_size=(3, 24, 24), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    augmentation = AugmentationConfig(random_erasing=0.3, erasing_mode="rand", scale=(0.5, 0.7), ratio=(0.9, 1.2))
    train, val = open_data(replace(config, interpolation="bilinear"), augmentation)
    assert train.finish == Finish(config.mean, config.std, 0.3, "rand")
    assert val.finish == Finish(config.mean, config.std)
    crop = random_crop(replace(config, interpolation="bilinear"), augmentation)
    assert vars(crop) == vars(train.crop)
    assert (crop.size, crop.scale, crop.ratio, crop.interpolation) == ((24, 24), (0.5, 0.7), (0.9, 1.2), "bilinear")
