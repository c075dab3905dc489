"""Small data sets with the oddities of ImageNet, COCO, ADE20K and Kinetics-400, drawn anew for each soak."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageDraw

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
    "profile": lambda x, p, _: x.save(p, "JPEG", icc_profile=_profile()),
    "grey": lambda x, p, _: x.convert("L").save(p, "JPEG"),
    "cmyk": lambda x, p, _: x.convert("CMYK").save(p, "JPEG"),
    "mpo": lambda x, p, _: x.save(p, "MPO", save_all=True, append_images=[x]),  # as telephones write
    "turned": lambda x, p, r: x.save(p, "JPEG", exif=_exif(int(r.integers(2, 9)))),
    "short-exif": lambda x, p, _: x.save(p, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01\x03\0\x01"),
    "cut-exif": lambda x, p, _: x.save(p, "JPEG", exif=_cut_exif()),
    "far-exif": lambda x, p, _: x.save(p, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\0\0"),
    "no-exif": lambda x, p, _: x.save(p, "JPEG", exif=b"Exif\0\0garbage"),
    "alpha": lambda x, p, r: _with_alpha(x, r).save(p, "PNG"),
    "palette": lambda x, p, _: x.quantize(64).save(p, "PNG"),
    "clear-palette": lambda x, p, r: x.quantize(64).save(p, "PNG", transparency=r.bytes(64)),
    "grey-alpha": lambda x, p, _: x.convert("LA").save(p, "PNG"),
    "16-bit": lambda x, p, _: Image.fromarray(np.asarray(x.convert("L")).astype(np.uint16) * 257).save(p, "PNG"),
    "1-bit": lambda x, p, _: x.convert("1").save(p, "PNG"),
    "gif": lambda x, p, _: x.quantize(32).save(p, "GIF", save_all=True, append_images=[x.quantize(8)]),
    "webp": lambda x, p, _: x.save(p, "WEBP"),
    "tiff": lambda x, p, _: x.save(p, "TIFF"),
}
SIZES = ((500, 375), (375, 500), (333, 500), (160, 120), (640, 480))
ODD_SIZES = ((1, 1), (30, 40), (2000, 20), (20, 2000), (3000, 2000))
MANY_PIXELS = (9500, 9500)  # more than Pillow opens without a warning


def _profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _with_alpha(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(Image.fromarray(random.integers(0, 256, picture.size[::-1], dtype=np.uint8)))
    return picture


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
    Image.new("L", MANY_PIXELS, 90).save(root / "val" / "n0000" / "many pixels.JPEG")
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


def _corners(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top, right, top, right, bottom, left, bottom]]


# what is odd about one object, of a picture of (width, height): its box and its polygons, or its runs
ODD_OBJECTS: tuple[Callable[[int, int], tuple[tuple[float, ...], Any]], ...] = (
    lambda w, h: ((5.5, 5.25, 1, 12), _corners(5.5, 5.25, 6.5, 17.25)),  # one pixel wide
    lambda w, h: ((3, 3, 0, 9), [[3, 3, 3, 12, 3, 12]]),  # of no size
    lambda w, h: ((w + 5, h + 5, 20, 20), _corners(w + 5, h + 5, w + 25, h + 25)),  # outside
    lambda w, h: ((w - 8, h - 8, 20, 20), _corners(w - 8, h - 8, w + 12, h + 12)),  # half outside
    lambda w, h: ((-6, -4, 20, 14), _corners(-6, -4, 14, 10)),
    lambda w, h: ((4, 4, 10, 10), [[4, 4, 14, 14]]),  # two points
    lambda w, h: ((2, 2, 8, 8), [[2, 2, 10, 2, 10, 10], [4, 4, 9, 4]]),  # one part sound, one of two points
    # a crowd: the two columns on the left
    lambda w, h: ((0, 0, 2, h), {"size": [h, w], "counts": [0, 2 * h, h * (w - 2)]}),
)
COCO_SIZES = ((640, 480), (640, 480), (375, 500), (640, 427), (480, 640))
ODD_COCO_SIZES = ((640, 64), (64, 640), (1500, 1000), (33, 20))


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
        for index in range(count):
            size = ODD_COCO_SIZES[index // 17 % 4] if index % 17 == 6 else COCO_SIZES[index % 5]
            number = 500 + 37 * index + (10**6 if index % 9 == 0 else 0)
            name = f"{number:012}.jpg"
            name = f"sub folder/{name}" if index % 10 == 5 else f"Füchse_狐_{name}" if index % 30 == 7 else name
            images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
            picture, objects = _texture(random, 5, size), []
            if index % 12 != 4:
                for label, points in _objects(random, ImageDraw.Draw(picture), size):
                    box = (*points.min(0), *np.ptp(points, axis=0))
                    objects.append((used[label], box, [points.ravel().tolist()]))
            if index % 5 != 4:
                objects.append((numbers[index % 8], *ODD_OBJECTS[index % 8](*size)))
            for category, box, parts in objects:
                left, top, width, height = (round(float(value), 2) for value in box)
                annotations.append({
                    "id": 900 + 13 * len(annotations), "image_id": number, "category_id": category,
                    "iscrowd": int(isinstance(parts, dict)), "bbox": [left, top, width, height],
                    "area": width * height, "segmentation": parts,
                })  # fmt: skip
            path = root / f"{split}2017" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # sizes and objects are of the file as it is stored
            options = {"exif": _exif(6)} if index % 11 == 10 else {}
            mode = "L" if index % 8 == 2 else "CMYK" if index % 25 == 6 else "RGB"
            picture.convert(mode).save(path, "JPEG", **options)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


ADE_CLASSES = 12  # the first of 150, whose logits would take most of a step


def draw_ade(root: Path, train: int, val: int) -> Path:
    """ADE20K's layout: maps with and without a palette, 0 and 255 for nothing, small and long pictures."""
    random = np.random.default_rng(2)
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            size = ((683, 512), (512, 683), (400, 300), (40, 30), (511, 33))[index % 5]
            picture, labels = _texture(random, 5, size), Image.new("L", size, int(random.integers(1, ADE_CLASSES + 1)))
            if index % 10 != 4:
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
    "h264.mp4": {}, "sound.mp4": {"sound": True}, "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.avi": {"codec": "mjpeg", "pixels": "yuvj420p"}, "vp9.webm": {"codec": "libvpx-vp9"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}}, "slow.mp4": {"rate": 12},
    "fast.mp4": {"rate": 60, "frames": 120}, "ntsc.mp4": {"rate": Fraction(30000, 1001)}, "a blank.mkv": {},
    "ünïcode_狐.mp4": {}, "short.mp4": {"frames": 5},
    "one.mp4": {"frames": 1}, "long.mp4": {"frames": 400}, "small.mp4": {"size": (32, 32)},
    "portrait.mp4": {"size": (120, 214)}, "wide.mp4": {"size": (400, 60)}, "irregular.mkv": {"irregular": True},
    "turned.mp4": {"metadata": {"rotate": "90"}}, "444.mp4": {"pixels": "yuv444p"},
    "10 bits.mp4": {"pixels": "yuv420p10le"},
}  # fmt: skip


def _draw_clip(
    path: Path,
    label: int,
    random: np.random.Generator,
    *,
    codec: str = "libx264",
    rate: int | Fraction = 25,
    frames: int = 40,
    size: tuple[int, int] = (160, 120),
    pixels: str = "yuv420p",
    metadata: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    irregular: bool = False,
    sound: bool = False,
) -> None:
    """A bright bar that wanders over the colour of the class."""
    import av

    width, height = size
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.metadata.update(metadata or {})
        stream.options = options or {}
        if irregular:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = file.add_stream("aac", rate=16000) if sound else None
        time = 0
        for number in range(frames):
            picture = np.full((height, width, 3), COLOURS[label], dtype=np.uint8)
            picture[: height // 3, : 1 + number * 2 % width] = 255
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            if irregular:
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                time += int(random.choice([20, 40, 40, 120]))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if voice is not None:
            for number in range(25):
                tone = random.normal(0, 0.1, (1, 1024)).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, 1024 * number
                file.mux(voice.encode(frame))
            file.mux(voice.encode())


def draw_kinetics(root: Path, train: int, val: int, classes: int = 4) -> Path:
    """Kinetics' layout with lists of paths and labels; beside them `broken/`, none of whose clips can be read."""
    random, kinds = np.random.default_rng(3), list(CLIPS.items())
    for split, count in (("train", train), ("val", val)):
        lines = []
        for index in range(count):
            label, (name, how) = index % classes, kinds[index % len(kinds)]
            folder = root / f"videos_{split}" / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            _draw_clip(folder / f"{index:03} {name}", label, random, **how)
            lines.append(f"class {label}/{index:03} {name} {label}\n")
        (root / f"kinetics400_{split}_list_videos.txt").write_text("".join(lines))
    (root / "broken").mkdir()
    whole = (root / "videos_train" / "class 0" / "000 h264.mp4").read_bytes()
    for name, content in (("cut.mp4", whole[: len(whole) * 2 // 3]), ("empty.mp4", b""), ("text.mp4", b"no clip")):
        (root / "broken" / name).write_bytes(content)
    return root
