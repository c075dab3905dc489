"""Drawn pictures to learn from without a download: shapes on textured ground, with the mask of every shape.

Each picture follows from its random generator alone. The shapes have anti-aliased edges and any turn, and hide each
other in part; each kind has a colour of its own that varies into that of the next, so that form has to decide. The
grounds differ in texture and, less so, in colour. A shape is data: whoever moves it from frame to frame draws a film.
"""

from __future__ import annotations

import colorsys
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hvt_backbones.atomic import whole_folder

Generator = np.random.Generator
SUPERSAMPLING = 4  # lines per pixel, for smooth edges
LEAST_INSIDE = 0.7  # share of a shape that is on the picture
LEAST_VISIBLE = 0.5  # share thereof that others leave to be seen
CROWD = 14  # shapes in a crowd
PLACEMENTS = 20  # tries to find room for a shape
HUE_SPREAD = 0.06  # standard deviation, where the circle is 1 and the kinds lie evenly on it
SIZES = (8.0, 96.0)  # pixels
PICTURE_SIZES = ((160, 160), (144, 192), (192, 144))  # height and width


def _polygon(corners: int, radii: Sequence[float] = (1.0,)) -> NDArray:
    """Corners on circles of these radii in turn, the first one at the top, (corners, 2)."""
    angles = 2 * np.pi * np.arange(corners) / corners
    return np.resize(radii, corners)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)


# name -> outlines within [-1, 1], (corners, 2) each: the outer one, then holes
KINDS: dict[str, tuple[NDArray, ...]] = {
    "disc": (_polygon(36),),
    "ring": (_polygon(36), _polygon(36, [0.5])),
    "square": (np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),),
    "star": (_polygon(10, [1.1, 0.45]),),
    "triangle": (np.array([[0.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape on a picture.

    Attributes:
        kind: a key of `KINDS`.
        center: x and y, in pixels.
        size: the side of the square that the unturned shape fills, in pixels.
        stretch: width over height, at equal area.
        angle: by which it is turned, in radians.
        colors: RGB from 0 to 1 at its two ends; between them they blend.
    """

    kind: str
    center: tuple[float, float]
    size: float
    stretch: float
    angle: float
    colors: tuple[tuple[float, float, float], tuple[float, float, float]]

    def outlines(self) -> list[NDArray]:
        """Corners in pixels, (corners, 2) each: the outer outline, then holes."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        scale = self.size / 2 * np.array([math.sqrt(self.stretch), 1 / math.sqrt(self.stretch)])
        return [outline * scale @ np.array([[cos, sin], [-sin, cos]]) + self.center for outline in KINDS[self.kind]]

    def coverage(self, height: int, width: int) -> NDArray:
        """The share of each pixel that the shape covers, (height, width) from 0 to 1."""
        canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
        draw = ImageDraw.Draw(canvas)
        for outline, fill in zip(self.outlines(), (255, 0), strict=False):
            # Pillow's corners are centres of pixels, ours lie between them
            draw.polygon([tuple(point) for point in outline * SUPERSAMPLING - 0.5], fill=fill)
        return np.asarray(canvas.reduce(SUPERSAMPLING), np.float64) / 255

    def paint(self, picture: NDArray, coverage: NDArray) -> None:
        """Draw onto a picture, (height, width, 3) from 0 to 1, in place."""
        rows, columns = np.indices(coverage.shape)
        along = (columns - self.center[0]) * math.cos(self.angle) + (rows - self.center[1]) * math.sin(self.angle)
        blend = np.clip(along / self.size + 0.5, 0, 1)[..., None]
        first, second = (np.array(color) for color in self.colors)
        picture += coverage[..., None] * (first + (second - first) * blend - picture)


def draw_shape(rng: Generator, kind: str, center: Sequence[float], size: float) -> Shape:
    """A shape of this kind and place with random turn, stretch and colours."""
    hue = list(KINDS).index(kind) / len(KINDS) + rng.normal(0, HUE_SPREAD)
    colors = [
        colorsys.hsv_to_rgb((hue + rng.uniform(-0.04, 0.04)) % 1, rng.uniform(0.5, 1), value)
        for value in rng.uniform(0.35, 1, 2)
    ]
    return Shape(
        kind=kind,
        center=(float(center[0]), float(center[1])),
        size=size,
        stretch=math.exp(rng.uniform(-0.3, 0.3)),
        angle=rng.uniform(0, 2 * math.pi),
        colors=tuple(colors),
    )


def _noise(rng: Generator, height: int, width: int, cell: tuple[float, float]) -> NDArray:
    """Smooth noise around 0, (height, width), that changes over `cell` pixels down and across."""
    coarse = rng.standard_normal([math.ceil(height / cell[0]) + 2, math.ceil(width / cell[1]) + 2]).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float64)


def _blades(rng: Generator, height: int, width: int) -> NDArray:
    return 0.11 * _noise(rng, height, width, (5, 1.2)) + 0.04 * _noise(rng, height, width, (20, 20))


def _grains(rng: Generator, height: int, width: int) -> NDArray:
    return 0.05 * _noise(rng, height, width, (1, 1)) + 0.07 * _noise(rng, height, width, (14, 14))


def _waves(rng: Generator, height: int, width: int) -> NDArray:
    phase = np.arange(height)[:, None] / rng.uniform(1.2, 2.2) + 2.5 * _noise(rng, height, width, (10, 24))
    return 0.10 * np.sin(phase)


# name -> hue of its colour (0 to 1), texture
GROUNDS: dict[str, tuple[float, Callable[[Generator, int, int], NDArray]]] = {
    "grass": (0.28, _blades),
    "sand": (0.12, _grains),
    "water": (0.55, _waves),
}


def draw_ground(rng: Generator, name: str, height: int, width: int) -> NDArray:
    """A textured surface, (height, width, 3) from 0 to 1."""
    hue, texture = GROUNDS[name]
    color = colorsys.hsv_to_rgb((hue + rng.normal(0, 0.06)) % 1, rng.uniform(0.15, 0.6), rng.uniform(0.4, 0.85))
    return np.clip(np.array(color) + texture(rng, height, width)[..., None], 0, 1)


@dataclass(frozen=True, kw_only=True)
class Item:
    """What is seen of one shape, or of a crowd of one kind.

    Attributes:
        kind: a key of `KINDS`.
        mask: its pixels, (height, width) bool.
        outline: the corners of a shape that is seen whole and has no hole, (corners, 2) in pixels; else None.
        crowd: whether it is many shapes at once.
    """

    kind: str
    mask: NDArray[np.bool_]
    outline: NDArray | None
    crowd: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; the latter two lie behind the last pixel."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and what is on it.

    Attributes:
        picture: (height, width, 3) uint8.
        items: shapes, then crowds; no pixel belongs to two.
        ground: for each pixel the ground, by its position in `GROUNDS`, also below an item, (height, width) uint8.
        unknown: pixels of strokes, which are of no kind, (height, width) bool.
    """

    picture: NDArray[np.uint8]
    items: tuple[Item, ...]
    ground: NDArray[np.uint8]
    unknown: NDArray[np.bool_]


def draw_scene(
    rng: Generator,
    height: int,
    width: int,
    *,
    shapes: int,
    crowd: bool = False,
    grounds: Sequence[str] | None = None,
    middle: Shape | None = None,
) -> Scene:
    """Draw a picture of one or two grounds, a few strokes that are of no kind, and shapes.

    Args:
        rng: all that is random comes from it.
        height, width: of the picture, in pixels.
        shapes: how many, evenly per octave of `SIZES`; fewer where there is no room, as a half of each is seen.
        crowd: draw many small shapes of one kind too, close together.
        grounds: names of the one above and the one below, which need not both be seen; None for any.
        middle: a shape behind the others.
    """
    picture, ground = _draw_grounds(rng, height, width, grounds or rng.choice(list(GROUNDS), 2, replace=False))
    unknown = _draw_strokes(rng, picture)
    placed: list[tuple[Shape, NDArray]] = []
    if crowd:
        kind, center = str(rng.choice(list(KINDS))), rng.uniform(0.25, 0.75, 2) * (width, height)
        members = [draw_shape(rng, kind, center + rng.normal(0, 9, 2), rng.uniform(8, 12)) for _ in range(CROWD)]
        placed += [(shape, shape.coverage(height, width)) for shape in members]
    if middle is not None:
        placed.append((middle, middle.coverage(height, width)))
    for _ in range(shapes):
        _place(rng, placed, height, width)
    for shape, coverage in placed:
        shape.paint(picture, coverage)

    masks = _visible([coverage for _, coverage in placed], height, width)
    items = []
    if crowd:
        items.append(Item(kind=kind, mask=np.any(masks[:CROWD], axis=0), outline=None, crowd=True))
    for (shape, coverage), mask in list(zip(placed, masks, strict=True))[CROWD if crowd else 0 :]:
        outer, *holes = shape.outlines()
        inside = (outer >= 0).all() and (outer <= (width, height)).all()
        whole = not holes and inside and np.array_equal(mask, coverage >= 0.5)
        items.append(Item(kind=shape.kind, mask=mask, outline=outer if whole else None))
    for mask in masks:
        unknown &= ~mask
    return Scene(picture=(picture * 255).round().astype(np.uint8), items=tuple(items), ground=ground, unknown=unknown)


def draw_crop(rng: Generator, name: str, side: int) -> Image.Image:
    """A square cut out around one shape of this kind, or of this ground, resized to `side`."""
    if name in GROUNDS:
        edge = int(rng.integers(32, 65))
        scene = draw_scene(rng, edge, edge, shapes=0, grounds=(name, name))
    else:
        size = _draw_size(rng, SIZES[1])
        edge = int(max(20, size * rng.uniform(1.1, 2.0)))
        center = edge / 2 + rng.uniform(-0.1, 0.1, 2) * edge
        scene = draw_scene(rng, edge, edge, shapes=int(rng.integers(0, 3)), middle=draw_shape(rng, name, center, size))
    return Image.fromarray(scene.picture).resize((side, side), Image.Resampling.BILINEAR)


def write_crops(folder: Path, *, train: int, val: int, side: int = 64, seed: int = 0) -> Path:
    """Write crops as `folder/{train,val}/NAME/*.png`, so many of each kind of shape and of ground.

    Returns:
        `folder`; one that holds something is used as it is.

    Raises:
        InputError: it cannot be written.
    """
    with whole_folder(folder) as staging:
        if staging is None:
            return folder
        for (split, count), name in itertools.product({"train": train, "val": val}.items(), [*KINDS, *GROUNDS]):
            place = staging / split / name
            place.mkdir(parents=True)
            for index in range(count):
                rng = scene_generator(seed, f"{split}/{name}", index)
                draw_crop(rng, name, side).save(place / f"{index:05d}.png")
    return folder


def scene_generator(seed: int, series: str, index: int) -> Generator:
    """The generator of one picture of a series, so that each can be drawn without the others."""
    return np.random.default_rng([seed, zlib.crc32(series.encode()), index])


def _draw_size(rng: Generator, largest: float) -> float:
    return math.exp(rng.uniform(math.log(SIZES[0]), math.log(max(largest, SIZES[0]))))


def _draw_grounds(rng: Generator, height: int, width: int, names: Sequence[str]) -> tuple[NDArray, NDArray]:
    horizon = rng.uniform(0.25, 0.75) * height + 0.06 * height * _noise(rng, 1, width, (1, width / 4))
    if rng.uniform() < 0.4:
        horizon[:] = 0  # one ground alone
    share = np.clip(np.arange(height)[:, None] + 1 - horizon, 0, 1)  # of the ground below, per pixel
    above, below = (draw_ground(rng, name, height, width) for name in names)
    numbers = [list(GROUNDS).index(name) for name in names]
    return above + share[..., None] * (below - above), np.where(share >= 0.5, *numbers[::-1]).astype(np.uint8)


def _draw_strokes(rng: Generator, picture: NDArray) -> NDArray:
    """Curved lines as distraction, painted in place; returns their pixels."""
    height, width = picture.shape[:2]
    covered = np.zeros((height, width), bool)
    for _ in range(rng.integers(0, 4)):
        canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
        points = (rng.uniform(0, 1, 2) + np.cumsum(rng.normal(0, 0.12, (5, 2)), 0)) * canvas.size
        thick = int(rng.integers(1, 4)) * SUPERSAMPLING
        ImageDraw.Draw(canvas).line([tuple(point) for point in points], fill=255, width=thick, joint="curve")
        coverage = np.asarray(canvas.reduce(SUPERSAMPLING), np.float64) / 255
        picture += coverage[..., None] * (rng.uniform(0, 1, 3) - picture)
        covered |= coverage >= 0.5
    return covered


def _place(rng: Generator, placed: list[tuple[Shape, NDArray]], height: int, width: int) -> None:
    """Add a shape in front, where it hides none of the others too much and is not too far outside itself."""
    kind, size = str(rng.choice(list(KINDS))), _draw_size(rng, min(SIZES[1], 0.8 * min(height, width)))
    for _ in range(PLACEMENTS):
        shape = draw_shape(rng, kind, rng.uniform(0, (width, height)), size)
        coverage = shape.coverage(height, width)
        outer, *holes = shape.outlines()
        if coverage.sum() < LEAST_INSIDE * (_area(outer) - sum(map(_area, holes))):
            continue
        coverages = [*(other for _, other in placed), coverage]
        seen = _visible(coverages, height, width)
        if all(mask.sum() >= LEAST_VISIBLE * whole.sum() for mask, whole in zip(seen, coverages, strict=True)):
            placed.append((shape, coverage))
            return


def _visible(coverages: Sequence[NDArray], height: int, width: int) -> list[NDArray]:
    """The pixels of each shape that no later one covers."""
    free, masks = np.ones((height, width), bool), []
    for coverage in reversed(coverages):
        masks.append((coverage >= 0.5) & free)
        free &= coverage < 0.5
    return masks[::-1]


def _area(outline: NDArray) -> float:
    x, y = outline.T
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
