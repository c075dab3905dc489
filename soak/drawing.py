"""Small data sets with the oddities of ImageNet, COCO, ADE20K and Kinetics-400, drawn anew for each soak."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x0112
COLOURS = ((220, 50, 40), (40, 200, 60), (50, 70, 230), (230, 220, 60), (200, 60, 210), (60, 210, 220))


def _exif(turn: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return exif.tobytes()


def _cut_exif() -> bytes:
    """A maker's name that lies outside of the data, beside a sound orientation: the commonest damage."""
    tags = struct.pack("<HHII", 0x010F, 2, 200, 5000) + struct.pack("<HHII", ORIENTATION, 3, 1, 1)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + b"\0" * 4


def _texture(random: np.random.Generator, label: int, size: tuple[int, int]) -> Image.Image:
    """Noise of a colour that tells the class."""
    width, height = size
    coarse = random.integers(0, 90, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((noise + np.array(COLOURS[label % len(COLOURS)]) // 2).clip(0, 255).astype(np.uint8))


# name -> how a picture is stored; each takes the picture, the path and random numbers
STORED: dict[str, Callable[[Image.Image, Path, np.random.Generator], Any]] = {
    "jpeg": lambda x, p, _: x.save(p, "JPEG", quality=85),
    "progressive": lambda x, p, _: x.save(p, "JPEG", progressive=True),
    "grey": lambda x, p, _: x.convert("L").save(p, "JPEG"),
    "cmyk": lambda x, p, _: x.convert("CMYK").save(p, "JPEG"),
    "turned": lambda x, p, r: x.save(p, "JPEG", exif=_exif(int(r.integers(2, 9)))),
    "cut-exif": lambda x, p, _: x.save(p, "JPEG", exif=_cut_exif()),
    "far-exif": lambda x, p, _: x.save(p, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\0\0"),
    "no-exif": lambda x, p, _: x.save(p, "JPEG", exif=b"Exif\0\0garbage"),
    "alpha": lambda x, p, _: x.convert("RGBA").save(p, "PNG"),
    "palette": lambda x, p, _: x.quantize(64).save(p, "PNG"),
    "clear-palette": lambda x, p, r: x.quantize(64).save(p, "PNG", transparency=r.bytes(64)),
    "grey-alpha": lambda x, p, _: x.convert("LA").save(p, "PNG"),
    "16-bit": lambda x, p, _: Image.fromarray(np.asarray(x.convert("L")).astype(np.uint16) * 257).save(p, "PNG"),
    "1-bit": lambda x, p, _: x.convert("1").save(p, "PNG"),
    "gif": lambda x, p, _: x.quantize(32).save(p, "GIF", save_all=True, append_images=[x.quantize(8)]),
    "webp": lambda x, p, _: x.save(p, "WEBP"),
    "tiff": lambda x, p, _: x.save(p, "TIFF"),
}
SIZES = ((160, 120), (120, 160), (200, 150), (64, 64), (250, 188))
ODD_SIZES = ((1, 1), (30, 40), (400, 12), (12, 400), (1600, 1200))


def draw_pictures(root: Path, train: int, val: int, classes: int = 6) -> Path:
    """ImageNet's layout: `train/n0001/...` and `val/n0001/...`, all under JPEG's name as ImageNet's odd ones are."""
    random, kinds = np.random.default_rng(0), list(STORED.items())
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % classes
            folder = root / split / f"n{label:04}"
            folder.mkdir(parents=True, exist_ok=True)
            name, store = kinds[index % len(kinds)]
            sizes = ODD_SIZES if index % 23 == 22 else SIZES
            picture = _texture(random, label, sizes[random.integers(len(sizes))])
            store(picture, folder / f"{index:05}_{name}.JPEG", random)
    return root


def _objects(random: np.random.Generator, pen: ImageDraw.ImageDraw, size: tuple[int, int]) -> list[tuple[int, list]]:
    """Draw some shapes; (class of four, polygon) of each."""
    found = []
    for _ in range(int(random.integers(1, 6))):
        label, side = int(random.integers(4)), float(random.uniform(0.15, 0.6)) * min(size)
        left, top = float(random.uniform(0, size[0] - side)), float(random.uniform(0, size[1] - side))
        angles = np.linspace(0, 2 * np.pi, 4 if label % 2 else 16, endpoint=False)
        points = np.stack([left + side / 2 * (1 + np.cos(angles)), top + side / 2 * (1 + np.sin(angles))], axis=1)
        pen.polygon([tuple(point) for point in points], fill=COLOURS[label])
        found.append((label, points.round(2)))
    return found


def draw_coco(root: Path, train: int, val: int) -> Path:
    """COCO's layout and category numbers, with crowds, objects outside and of no size, pictures without objects."""
    from mmdet.datasets import CocoDataset

    random = np.random.default_rng(1)
    numbers = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    names = CocoDataset.METAINFO["classes"]
    categories = [{"id": number, "name": name} for number, name in zip(numbers, names, strict=True)]
    used = [numbers[index] for index in (0, 11, 40, 79)]
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        folder = root / f"{split}2017"
        for index in range(count):
            size = ODD_SIZES[1 + index % 4] if index % 17 == 16 else (640, 480) if index % 3 else (375, 500)
            name = f"sub folder/{index:012}.jpg" if index % 10 == 5 else f"{index:012}.jpg"
            picture = _texture(random, 5, size)
            entry = {"id": 500 + 37 * index, "file_name": name, "width": size[0], "height": size[1]}
            images.append(entry)

            def add(category: int, box: Any, parts: Any, entry: dict = entry, into: list = annotations, **more) -> None:
                left, top, width, height = (round(float(value), 2) for value in box)
                into.append({
                    "id": 900 + 13 * len(into), "image_id": entry["id"], "category_id": category, "iscrowd": 0,
                    "bbox": [left, top, width, height], "area": width * height, "segmentation": parts, **more,
                })  # fmt: skip

            if index % 12 != 4:
                for label, points in _objects(random, ImageDraw.Draw(picture), size):
                    low, extent = points.min(0), np.ptp(points, axis=0)
                    add(used[label], (*low, *extent), [points.ravel().tolist()])
            width, height = size
            if index % 7 == 1:  # one pixel wide
                add(numbers[1], (5, 5, 1, 12), [[5, 5, 6, 5, 6, 17, 5, 17]])
            if index % 7 == 2:
                add(numbers[2], (3, 3, 0, 9), [[3, 3, 3, 12, 3, 12]])
            if index % 7 == 3:  # outside
                right, below = width + 5, height + 5
                add(numbers[3], (right, below, 20, 20), [[right, below, right + 20, below, right, below + 20]])
            if index % 7 == 4:  # one part sound, one of two points
                add(numbers[6], (2, 2, 8, 8), [[2, 2, 10, 2, 10, 10], [4, 4, 9, 4]])
            if index % 7 == 5:
                runs = [0, 2 * height, height * (width - 2)]  # the two columns on the left
                add(numbers[0], (0, 0, 2, height), {"size": [height, width], "counts": runs}, iscrowd=1)
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # sizes and objects are of the file as it is stored
            options = {"exif": _exif(6)} if index % 11 == 10 else {}
            (picture.convert("L") if index % 8 == 2 else picture).save(path, "JPEG", **options)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def draw_ade(root: Path, train: int, val: int) -> Path:
    """ADE20K's layout: maps with and without a palette, 0 and 255 for nothing, small and long pictures."""
    random = np.random.default_rng(2)
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            size = ((683, 512), (512, 683), (400, 300), (40, 30), (511, 33))[index % 5]
            picture, labels = _texture(random, 5, size), Image.new("L", size, int(random.integers(1, 151)))
            for label, points in _objects(random, ImageDraw.Draw(picture), size):
                ImageDraw.Draw(labels).polygon([tuple(point) for point in points], fill=label + 1)
            if index % 8 == 2:
                ImageDraw.Draw(labels).rectangle((0, 0, size[0], 2), fill=255)
            if index % 20 == 5:
                labels = Image.new("L", size, 0)
            if index % 2:
                labels.putpalette(random.bytes(768))
            name, options = f"{index:08}", {"exif": _exif(6)} if index % 13 == 6 else {}
            picture = picture.convert("L") if index % 9 == 8 else picture
            picture.save(root / "images" / split / f"{name}.jpg", **options)
            labels.save(root / "annotations" / split / f"{name}.png")
    return root


CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {}, "mpeg4.avi": {"codec": "mpeg4"}, "vp9.webm": {"codec": "libvpx-vp9"}, "fast.mp4": {"rate": 60},
    "a blank.mkv": {}, "short.mp4": {"frames": 5}, "one.mp4": {"frames": 1}, "portrait.mp4": {"size": (120, 214)},
    "wide.mp4": {"size": (400, 60)}, "444.mp4": {"pixels": "yuv444p"}, "10 bits.mp4": {"pixels": "yuv420p10le"},
}  # fmt: skip


def draw_kinetics(root: Path, train: int, val: int, classes: int = 4) -> Path:
    """Kinetics' layout with lists of paths and labels; the colour tells the class."""
    import av

    kinds = list(CLIPS.items())
    for split, count in (("train", train), ("val", val)):
        lines = []
        for index in range(count):
            label, (name, how) = index % classes, kinds[index % len(kinds)]
            folder = root / f"videos_{split}" / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            width, height = how.get("size", (160, 120))
            with av.open(str(folder / f"{index:03} {name}"), "w") as file:
                stream = file.add_stream(how.get("codec", "libx264"), rate=how.get("rate", 25))
                stream.width, stream.height, stream.pix_fmt = width, height, how.get("pixels", "yuv420p")
                for number in range(how.get("frames", 40)):
                    frame = np.full((height, width, 3), COLOURS[label], dtype=np.uint8)
                    frame[: height // 3, : 1 + number * 2 % width] = 255
                    file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
                file.mux(stream.encode())
            lines.append(f"class {label}/{index:03} {name} {label}\n")
        (root / f"kinetics400_{split}_list_videos.txt").write_text("".join(lines))
    return root
