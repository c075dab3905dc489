"""`video.clips`, `video.lists` and `video.decoders`: lists, damaged files, decoders and worker processes."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from hvt_backbones.errors import InputError
from tests.video.conftest import steps, write_clip, write_list, write_sound
from video.clips import ClipAccMetric, ClipDataset
from video.decoders import ClipError, find_videos
from video.predict import read_frames

DECODERS = ("decord", "pyav")
DECODE_ALL = [
    dict(type="mmaction.DecordInit"),
    dict(type="mmaction.SampleFrames", clip_len=16, frame_interval=1, num_clips=1, test_mode=True),
    dict(type="mmaction.DecordDecode"),
]


def dataset(folder: Path, lines: list[str] | str = "good.mp4 0", **arguments: Any) -> ClipDataset:
    """Of a list in `folder`, where `good.mp4` is."""
    if not (folder / "good.mp4").exists():
        write_clip(folder / "good.mp4")
    write_list(folder / "list.txt", [lines] if isinstance(lines, str) else lines)
    arguments = {"pipeline": scoped(steps(training=True)), **arguments}
    return ClipDataset(str(folder / "list.txt"), data_prefix=dict(video=str(folder)), **arguments)


def scoped(pipeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(step, type=f"mmaction.{step['type']}") for step in pipeline]


LISTS = {
    "no label": ("good.mp4", "list.txt line 2: 'good.mp4' is not `path label`"),
    "word": ("good.mp4 cat", "list.txt line 2: the label 'cat' of good.mp4 is no whole number from 0"),
    "negative": ("good.mp4 -1", "line 2: the label '-1' of good.mp4 is no whole number"),
    "fraction": ("good.mp4 1.0", "line 2: the label '1.0' of good.mp4 is no whole number"),
    "range": ("good.mp4 3", "line 2: the label 3 of good.mp4 is not below 3, the number of classes"),
    "twice": ("first.mp4 0", "line 2: first.mp4 is in line 1 already"),
    "missing": ("gone/x.mp4 1", "gone/x.mp4 does not exist; `python -m video.check"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_bad_line_is_named_by_its_number(case: str, tmp_path: Path) -> None:
    line, message = LISTS[case]
    write_clip(tmp_path / "first.mp4")
    with pytest.raises(InputError) as caught:
        dataset(tmp_path, ["first.mp4 0", line], num_classes=3)
    assert message in str(caught.value)
    assert "list.txt line 2: " in str(caught.value)
    assert "more)" not in str(caught.value)


@pytest.mark.parametrize("bad", ["{} cat", "{} 0"])
def test_more_bad_lines_are_counted(bad: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"list.txt line 2: .*gone1.mp4 .* \(and 2 more\)") as caught:
        dataset(tmp_path, ["good.mp4 0", *(bad.format(f"gone{index}.mp4") for index in (1, 2, 3))])
    assert "\n" not in str(caught.value)


def test_labels_are_checked_against_named_classes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label 2 of good.mp4 is not below 2"):
        dataset(tmp_path, "good.mp4 2", metainfo=dict(classes=["run", "jump"]))


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "is empty"), (b"\xff\xfe\x00 1\n", "is no text")])
def test_a_file_that_is_no_list(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        ClipDataset(str(tmp_path / "list.txt"), scoped(steps(training=True)))


def test_blanks_in_paths_empty_lines_and_names_without_suffix(tmp_path: Path) -> None:
    name = "playing the  fl\u00fcte/a\u2028clip.mp4"
    write_clip(tmp_path / name)
    data = dataset(tmp_path, ["", f"{name}   2\r", "  good\t1  ", ""])
    infos = [data.get_data_info(index) for index in range(len(data))]
    assert [info["label"] for info in infos] == [2, 1]
    assert [info["filename"] for info in infos] == [
        f"{tmp_path}/{name}",
        f"{tmp_path}/good.mp4",
    ]
    assert data[0]["inputs"].shape == data[1]["inputs"].shape == (1, 3, 4, 32, 32)


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "is empty (0 bytes)"


def sound(path: Path) -> str:
    write_sound(path)
    return "has no video stream (it holds audio)"


def text(path: Path) -> str:
    path.write_text("<html>404</html>")
    return "cannot be decoded ("


def cut_off(path: Path) -> str:
    content = write_clip(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])  # the index is at the end
    return "cannot be decoded ("


def damaged(path: Path) -> str:
    content = bytearray(write_clip(path, 60, codec="libx264", options={"movflags": "faststart"}).read_bytes())
    start = content.index(b"mdat") + 4
    content[start:] = np.random.default_rng(0).bytes(len(content) - start)
    path.write_bytes(content)
    return "cannot be decoded ("


def short(path: Path) -> str:
    write_clip(path, 9)
    return "has 9 frames of at least 10"


def missing(path: Path) -> str:
    return "does not exist"


BAD = (empty, sound, text, cut_off, damaged, short)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("make", BAD)
def test_a_clip_that_cannot_be_read_is_named(make: Any, decoder: str, tmp_path: Path) -> None:
    reason = make(tmp_path / "bad.mp4")
    data = dataset(tmp_path, ["good.mp4 0", "bad.mp4 1"], decoder=decoder, min_frames=10)
    assert data[0]["inputs"].shape == (1, 3, 4, 32, 32)
    with pytest.raises(InputError) as caught:
        data[1]
    assert str(caught.value).startswith(f"clip {tmp_path}/bad.mp4 {reason}")
    assert "set on_error=skip" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("make", [damaged, missing])
def test_skip_takes_the_next_clip_and_names_what_it_passed_over(make: Any, decoder: str, tmp_path: Path) -> None:
    make(tmp_path / "bad.mp4")
    write_clip(tmp_path / "last.mp4")
    lines = ["good.mp4 0", "last.mp4 2", "bad.mp4 1"]
    data = dataset(tmp_path, lines, decoder=decoder, min_frames=10, on_error="skip", max_errors=0.34)
    sample = data[2]["data_samples"]
    assert sample.gt_label.tolist() == [0]
    assert sample.unreadable == [f"{tmp_path}/bad.mp4"]
    assert "unreadable" not in data[1]["data_samples"]
    strict = dataset(tmp_path, lines, decoder=decoder, min_frames=10, on_error="skip", max_errors=0)
    with pytest.raises(InputError, match=r"1 of 3 clips cannot be read, max_errors of the data set allows 0; the last"):
        strict[2]


def test_clips_that_are_all_unreadable_end_the_search(tmp_path: Path) -> None:
    data = dataset(tmp_path, ["a.mp4 0", "b.mp4 1"], on_error="skip", max_errors=1.0)
    with pytest.raises(InputError, match="2 of 2 clips cannot be read"):
        data[1]


def test_a_short_clip_is_taken_again_from_its_beginning(tmp_path: Path) -> None:
    """As mmaction2 does it, which published results rest on."""
    write_clip(tmp_path / "short.mp4", 3)
    pipeline = [DECODE_ALL[0], dict(DECODE_ALL[1], clip_len=5), DECODE_ALL[2]]
    frames = dataset(tmp_path, "short.mp4 0", pipeline=pipeline, test_mode=True)[0]["imgs"]
    assert [np.array_equal(frame, frames[0]) for frame in frames] == [True, False, False, True, False]
    assert np.array_equal(frames[4], frames[1])


def test_faults_of_the_pipeline_are_not_the_clips(tmp_path: Path) -> None:
    pipeline = [*DECODE_ALL, lambda results: results["images"]]
    with pytest.raises(KeyError, match="images"):
        dataset(tmp_path, pipeline=pipeline, on_error="skip", max_errors=1.0)[0]
    pipeline = [dict(DECODE_ALL[0]), dict(DECODE_ALL[1], clip_len="long"), DECODE_ALL[2]]
    with pytest.raises(TypeError):
        dataset(tmp_path, pipeline=pipeline, on_error="skip", max_errors=1.0)[0]
    with pytest.raises(InputError, match="the step <lambda> made nothing of .*good.mp4"):
        dataset(tmp_path, pipeline=[*DECODE_ALL, lambda results: None])[0]


SETTINGS = {
    "on_error": ("ignore", "on_error is 'ignore': choose fail or skip"),
    "max_errors": (1.5, "max_errors is 1.5: give a share"),
    "min_frames": (0, "min_frames is 0: give a whole number from 1"),
    "decoder": ("opencv", "decoder is 'opencv': choose one of auto, decord, pyav"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name: str, tmp_path: Path) -> None:
    value, message = SETTINGS[name]
    with pytest.raises(InputError) as caught:
        dataset(tmp_path, **{name: value})
    assert message in str(caught.value)


def test_frames_for_a_strip_that_are_damaged_name_the_clip(tmp_path: Path) -> None:
    reason = damaged(tmp_path / "bad.mp4")
    with pytest.raises(ClipError) as caught:
        read_frames(dataset(tmp_path), tmp_path / "bad.mp4", 8)
    assert str(caught.value).startswith(reason)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_as_the_main_process_does(start: str, decoder: str, tmp_path: Path) -> None:
    lines = [f"{index}.mp4 {index}" for index in range(4)]
    for index in range(4):
        write_clip(tmp_path / f"{index}.mp4", label=index)
    empty(tmp_path / "3.mp4")
    data = dataset(
        tmp_path, lines, pipeline=scoped(steps(training=False)), test_mode=True, decoder=decoder, on_error="skip",
        max_errors=0.25,
    )  # fmt: skip
    expected = [data[index] for index in range(4)]
    loader = DataLoader(data, num_workers=2, multiprocessing_context=start, collate_fn=pseudo_collate)
    for batch, sample in zip(loader, expected, strict=True):
        assert torch.equal(batch["inputs"][0], sample["inputs"])
    assert batch["data_samples"][0].unreadable == [f"{tmp_path}/3.mp4"]


def result(label: int, scores: list[float], **others: Any) -> dict[str, Any]:
    return {"pred_score": torch.tensor(scores), "gt_label": torch.tensor([label]), **others}


def test_clips_that_are_left_out_are_counted_apart() -> None:
    metric = ClipAccMetric(metric_options=dict(top_k_accuracy=dict(topk=(1,))))
    samples = [result(0, [0.9, 0.1]), result(1, [0.9, 0.1], unreadable=["x.mp4"]), result(1, [0.8, 0.2])]
    metric.process({}, samples)
    assert metric.evaluate(3) == {"acc/top1": 0.5, "acc/mean1": 0.5, "acc/clips": 2, "acc/left_out": 1}
    metric.process({}, samples[::2])
    assert metric.evaluate(2) == {"acc/top1": 0.5, "acc/mean1": 0.5}
    metric.process({}, samples[1:2])
    with pytest.raises(InputError, match="none of the clips"):
        metric.evaluate(1)


def test_folders_are_searched_for_videos(tmp_path: Path) -> None:
    for name in ("b.webm", "a/x.MP4", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos([str(tmp_path)]) == [tmp_path / "a" / "x.MP4", tmp_path / "b.webm"]
    (tmp_path / "none").mkdir()
    for given, message in {"none": "holds no videos", "gone": "does not exist"}.items():
        with pytest.raises(InputError, match=message):
            find_videos([str(tmp_path / given)])
    with pytest.raises(InputError, match="path is empty"):
        find_videos([""])
