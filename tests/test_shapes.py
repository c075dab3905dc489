"""The drawn pictures: reproducible, with masks that fit what is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from demos.shapes import (
    GROUNDS,
    KINDS,
    LEAST_VISIBLE,
    SIZES,
    Shape,
    draw_scene,
    draw_shape,
    scene_generator,
    write_crops,
)


def scene(index: int, **options: object):
    return draw_scene(scene_generator(0, "test", index), 96, 128, shapes=6, **options)


def test_a_picture_follows_from_its_seed_alone() -> None:
    assert np.array_equal(scene(1).picture, scene(1).picture)
    assert not np.array_equal(scene(1).picture, scene(2).picture)
    others = [scene_generator(1, "test", 1), scene_generator(0, "other", 1)]
    assert len({generator.integers(2**60) for generator in [scene_generator(0, "test", 1), *others]}) == 3


def test_no_pixel_belongs_to_two() -> None:
    for index in range(8):
        found = scene(index, crowd=index % 2 == 1)
        owners = sum(item.mask.astype(int) for item in found.items) + found.unknown
        assert owners.max() <= 1
        assert [item.crowd for item in found.items].count(True) == index % 2
        assert {item.kind for item in found.items} <= set(KINDS)
        assert found.ground.shape == found.picture.shape[:2] == (96, 128)
        assert found.ground.max() < len(GROUNDS)


def test_half_of_every_shape_is_seen() -> None:
    hidden = 0
    for index in range(8):
        for item in scene(index).items:
            left, top, right, bottom = item.box
            assert item.mask[top:bottom, left:right].sum() == item.mask.sum() > 0.2 * LEAST_VISIBLE * SIZES[0] ** 2
            hidden += item.outline is None
    assert hidden, "nothing hides anything"


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_smooth_and_areas_right(kind: str) -> None:
    shape = draw_shape(np.random.default_rng(0), kind, (30.5, 24.0), 32.0)
    coverage = shape.coverage(48, 61)
    outer, *holes = ((x, y) for x, y in (outline.T for outline in shape.outlines()))

    def area(x: np.ndarray, y: np.ndarray) -> float:
        return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2

    assert coverage.sum() == pytest.approx(area(*outer) - sum(area(*hole) for hole in holes), rel=0.03)
    edge = (coverage > 0) & (coverage < 1)
    assert edge.sum() > 40
    assert len(np.unique(coverage[edge])) > 8
    picture = np.zeros((48, 61, 3))
    shape.paint(picture, coverage)
    assert picture.min() >= 0
    assert np.array_equal(picture.any(2), coverage > 0)


def test_a_shape_lies_where_its_center_is() -> None:
    shape = Shape(kind="square", center=(20.0, 12.0), size=10.0, stretch=1.0, angle=0.0, colors=((1, 1, 1),) * 2)
    rows, columns = np.nonzero(shape.coverage(30, 40) >= 0.5)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (15, 24, 7, 16)


def test_crops_lie_in_class_folders_and_are_drawn_once(tmp_path: Path) -> None:
    folder = write_crops(tmp_path / "crops", train=2, val=1)
    names = sorted([*KINDS, *GROUNDS])
    for split, count in {"train": 2, "val": 1}.items():
        assert sorted(path.name for path in (folder / split).iterdir()) == names
        assert all(len(list((folder / split / name).glob("*.png"))) == count for name in names)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len({path.read_bytes() for path in before}) == len(before)
    write_crops(folder, train=2, val=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
