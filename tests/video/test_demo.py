"""`python -m video.demo`: a true Kinetics is drawn, and Video Swin learns from it which way things go."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from mmengine.config import Config

from classification import train
from demos import kinetics as shapes
from demos import training as common
from demos import video as demo
from demos.kinetics import FRAMES, HEIGHT, INTERVAL, MOTIONS, ROUND, STEPS, WIDTH, draw_clip, draw_states, write_clips
from demos.training import PRETRAINED, Goal, Training, verdict
from demos.video import CONFIGS, shuffle_frames
from tests.dense_demos import check_pictures, quick_demo
from video.clips import ClipDataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("data") / "clips", train=16, val=8)


def config() -> Config:
    return Config.fromfile(next(CONFIGS.glob("*.py")))


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("start", [0, 3, ROUND - 1])
def test_each_window_shows_the_whole_cycle_in_order(motion: str, start: int) -> None:
    axis, sign = MOTIONS[motion]
    states = draw_states(np.random.default_rng(0), motion)[(start + INTERVAL * np.arange(STEPS)) % ROUND]
    assert np.allclose((np.diff(states[:, axis]) * sign) % 1, 1 / STEPS)
    assert np.allclose(np.diff(np.sort(states[:, axis])), 1 / STEPS)
    assert (np.delete(states, axis, axis=1) == np.delete(states[0], axis)).all()


def test_neighbours_are_the_two_directions_of_a_motion() -> None:
    directions = list(MOTIONS.values())
    assert all(one == (axis, -sign) for one, (axis, sign) in zip(directions[::2], directions[1::2], strict=True))


@pytest.mark.parametrize(("one", "other"), [*zip(list(MOTIONS)[::2], list(MOTIONS)[1::2], strict=True)])
def test_the_two_directions_have_the_same_frames(one: str, other: str) -> None:
    """From the same random numbers, in the opposite order: as sets they cannot be told apart."""
    first, second = (draw_clip(np.random.default_rng(5), motion) for motion in (one, other))
    assert not np.array_equal(first, second)
    assert np.array_equal(first[0], second[0])
    backwards = np.abs(first[1:].astype(int) - second[:0:-1].astype(int))
    assert backwards.max() <= 1  # of 255: rounding


def test_clips_move_as_they_are_called() -> None:
    def shape_at(frame: np.ndarray) -> tuple[float, float, float]:
        """Where the shape is, which is brighter than the ground, and its area."""
        bright = frame.astype(int).max(2) > 150
        rows, columns = np.nonzero(bright)
        return float(columns.mean()), float(rows.mean()), float(bright.sum())

    for motion, (axis, sign) in MOTIONS.items():
        if axis == 2:
            continue
        steps = []
        for seed in range(4):
            seen = np.array([shape_at(frame) for frame in draw_clip(np.random.default_rng(seed), motion)])
            steps += np.diff(seen[:, min(axis, 2)]).tolist()
        # all but the one back to the beginning
        assert np.mean(np.sign(steps) == sign) > 0.8, motion


def test_mmaction_reads_the_layout(drawn: Path) -> None:
    pipeline = [{**step, "type": f"mmaction.{step.type}"} for step in config().test_dataloader.dataset.pipeline]
    data = ClipDataset(
        ann_file=str(drawn / "kinetics400_train_list_videos.txt"),
        data_prefix={"video": str(drawn / "videos_train")},
        metainfo={"classes": tuple(MOTIONS)},
        pipeline=pipeline,
        test_mode=True,
        num_classes=len(MOTIONS),
    )
    assert [data.get_data_info(index)["label"] for index in range(16)] == [*range(8), *range(8)]
    sample = data[3]
    assert sample["inputs"].shape == (4 * 3, 3, STEPS, HEIGHT, HEIGHT)
    clips = sample["inputs"].reshape(4, 3, 3, STEPS, HEIGHT, HEIGHT)
    assert len({clip.numpy().tobytes() for clip in clips.flatten(0, 1)}) == 12, "4 clips and 3 crops all differ"


def test_a_decoder_gives_back_the_frames_in_order(drawn: Path) -> None:
    with av.open(str(drawn / "videos_val" / "right" / "00000.mp4")) as container:
        assert container.streams.video[0].codec_context.name in ("h264", "mpeg4")
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == (FRAMES, HEIGHT, WIDTH, 3)
    frames = draw_clip(shapes.scene_generator(0, "val/right", 0), "right")
    for index, picture in enumerate(decoded.astype(int)):
        differences = np.abs(frames.astype(int) - picture).mean((1, 2, 3))
        assert differences.argmin() == index % ROUND
        assert differences.min() < 8  # of 255


def test_clips_are_the_same_each_time(drawn: Path, tmp_path: Path) -> None:
    again = write_clips(tmp_path / "clips", train=16, val=8)
    files = sorted(path.relative_to(drawn) for path in drawn.rglob("*.*"))
    assert len(files) == 16 + 8 + 2
    assert all((drawn / file).read_bytes() == (again / file).read_bytes() for file in files)


def test_the_other_codec_takes_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    shapes.write_mp4(tmp_path / "clip.mp4", np.zeros((5, 16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        assert len(list(container.decode(video=0))) == 5


def test_shuffling_keeps_the_frames_of_each_clip() -> None:
    frames = np.arange(32)
    given = {"filename": "videos_val/left/00000.mp4", "num_clips": 4, "frame_inds": frames}
    shuffled = shuffle_frames(dict(given))["frame_inds"]
    pairs = zip(shuffled.reshape(4, 8), frames.reshape(4, 8), strict=True)
    assert (np.sort(shuffled.reshape(4, 8), axis=1) == frames.reshape(4, 8)).all()
    assert all((clip != in_order).any() for clip, in_order in pairs)
    assert (shuffle_frames(dict(given))["frame_inds"] == shuffled).all()
    other = shuffle_frames({**given, "filename": "videos_val/right/00000.mp4"})["frame_inds"]
    assert not np.array_equal(other, shuffled)


def test_the_configuration_knows_the_motions() -> None:
    cfg = config()
    names = list(MOTIONS)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert list(loader.dataset.metainfo.classes) == names
        sampling = next(step for step in loader.dataset.pipeline if step.type == "SampleFrames")
        assert (sampling.clip_len, sampling.frame_interval) == (STEPS, INTERVAL)
    flip = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == "Flip")
    swapped = {names[one]: names[other] for one, other in flip.flip_label_map.items()}
    assert swapped == {
        "left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise",
    }  # fmt: skip


@pytest.mark.parametrize(("value", "message"), [(0.12, None), (0.6, "above 0.5"), (float("nan"), "above 0.5")])
def test_what_is_not_near_chance_fails(value: float, message: str | None) -> None:
    goal = Goal(name="shuffled", key="shuffled/top1", required=0.5, quick=0.5, at_most=True, chance=0.125)
    training = Training(start=PRETRAINED, runner=None, history=[(1, {})], tested={"shuffled": value})
    table, failures = verdict([training], [goal], False)
    assert "0.125" in table
    assert "<= 0.500" in table
    assert bool(failures) == (message is not None)
    assert message is None or any(message in failure for failure in failures)


def test_what_quick_does_not_demand_is_no_failure() -> None:
    goal = Goal(name="shuffled", key="shuffled/top1", required=0.5, quick=None, at_most=True)
    training = Training(start=PRETRAINED, runner=None, history=[(1, {})], tested={"shuffled": 0.55})
    assert verdict([training], [goal], False)[1] == ["shuffled 0.550 is above 0.5"]
    table, failures = verdict([training], [goal], True)
    assert table.splitlines()[-1].split() == ["required", "-"]
    assert failures == []


def test_a_pretraining_that_fails_ends_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shapes, "write_clips", lambda folder, **counts: folder)
    monkeypatch.setattr(common, "write_crops", lambda folder, **counts: folder)
    monkeypatch.setattr(train, "main", lambda options: 7)
    assert demo.main(["--work-dir", str(tmp_path), "--data-dir", str(tmp_path)]) == 7
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    status, printed = quick_demo(demo.main, tmp_path)
    assert status == 0, printed
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["pretrained"]) == {"top-1", "top-1, shuffled", "direction, shuffled"}
    check_pictures(tmp_path / "run")
