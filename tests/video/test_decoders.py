"""`video.decoders`: both give the same frames, turned and in order, and what one cannot do the other does."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

import itertools
import random
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from mmengine.dataset import Compose

from hvt_backbones.errors import InputError
from tests.video.conftest import SIDE, write_clip, write_list
from tests.video.test_clips import DECODE_ALL, DECODERS, dataset
from video.check import main as check
from video.clips import decoding_steps, said
from video.decoders import find_decoder, probe

KINDS = {
    "clip.mp4": dict(codec="libx264", encoder=dict(bf="3", g="12")),
    "clip.avi": dict(codec="mpeg4"),
    "reordered.avi": dict(codec="mpeg4", encoder=dict(bf="2", g="12")),
    "clip.mpg": dict(codec="mpeg2video", rate=25),
    "clip.webm": dict(codec="libvpx"),  # neither this nor the next states a number of frames
    "clip.mkv": dict(codec="libx264"),
    "old.mp4": dict(codec="mpeg4"),
    "varying.mkv": dict(codec="libx264", times=[40 * index + index % 5 for index in range(33)]),
    "ten bits.mp4": dict(codec="libx264", pix_fmt="yuv420p10le"),
    "ten bits.mov": dict(codec="libx265", pix_fmt="yuv420p10le", encoder={"x265-params": "log-level=none"}),
    "ten bits of 4:2:2.mp4": dict(codec="libx264", pix_fmt="yuv422p10le"),
    "no subsampling.mp4": dict(codec="libx264", pix_fmt="yuv444p"),
    "photographs.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "full range of BT.709.mp4": dict(codec="libx264", color_range=2, colorspace=1),
    "interlaced.mp4": dict(codec="libx264", encoder=dict(flags="+ildct+ilme")),
    "odd width.webm": dict(codec="libvpx-vp9", width=61),
    "odd width of ten bits.mkv": dict(codec="ffv1", pix_fmt="yuv420p10le", width=61),
}


@pytest.mark.parametrize("name", KINDS)
def test_both_decoders_give_the_same_frames(name: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / name, 33, **KINDS[name])
    pipelines = {decoder: Compose(decoding_steps(DECODE_ALL, decoder)) for decoder in DECODERS}
    info = dict(filename=str(path), label=0, start_index=0, modality="RGB")
    decord, pyav = (pipelines[decoder](dict(info)) for decoder in DECODERS)
    for key in ("total_frames", "avg_fps", "original_shape"):
        assert decord[key] == pytest.approx(pyav[key]), key
    assert decord["total_frames"] == probe(path, "decord") == probe(path, "pyav") == 33
    assert decord["frame_inds"].tolist() == pyav["frame_inds"].tolist() == list(range(8, 24))
    images = [np.stack(decoded["imgs"]).astype(int) for decoded in (decord, pyav)]
    assert abs(images[0] - images[1]).max() <= 2  # of 255: each has an FFmpeg of its own
    assert all(abs(before - after).max() > 3 for before, after in itertools.pairwise(images[1]))
    assert decord["imgs"][0].shape == (SIDE, KINDS[name].get("width", SIDE), 3)
    samples = []
    for decoder in DECODERS:  # the places to sample from are drawn alike
        data = dataset(tmp_path, f"{name} 0", decoder=decoder)
        np.random.seed(3)  # noqa: NPY002 - mmaction2 draws from it
        random.seed(3)
        samples.append(data[0]["inputs"])
    assert torch.equal(*samples)


def test_of_several_streams_pyav_takes_the_best(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "two.mp4"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in range(2)]
        for stream, side in zip(streams, (32, 64), strict=True):
            stream.width = stream.height = side
        streams[1].disposition = av.stream.Disposition.default
        for _ in range(20):
            for stream in streams:
                picture = np.zeros((stream.height, stream.width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    info = dict(filename=str(tmp_path / "two.mp4"), label=0, start_index=0, modality="RGB")
    for decoder in ("auto", "pyav"):
        assert Compose(decoding_steps(DECODE_ALL, decoder))(dict(info))["original_shape"] == (64, 64)
    with pytest.raises(InputError, match=r"another of 2 video streams .*, but decoder=\"pyav\" can"):
        dataset(tmp_path, "two.mp4 0", decoder="decord")[0]


TURNS = {  # the matrix's a, b, c, d (of a row of pixels x, y to a x + c y, b x + d y), and what it does
    "quarter clockwise": ((0, 1, -1, 0), lambda frames: np.rot90(frames, -1, (1, 2))),
    "half": ((-1, 0, 0, -1), lambda frames: np.rot90(frames, 2, (1, 2))),
    "quarter counterclockwise": ((0, -1, 1, 0), lambda frames: np.rot90(frames, 1, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda frames: frames[:, :, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda frames: frames[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda frames: frames.swapaxes(1, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda frames: np.rot90(frames, 2, (1, 2)).swapaxes(1, 2)),
    "an eighth": ((0.7071, 0.7071, -0.7071, 0.7071), lambda frames: frames),
}


@pytest.mark.parametrize("turn", TURNS)
def test_both_decoders_turn_a_clip_as_its_header_says(turn: str, tmp_path: Path) -> None:
    """Also to a width at which decord by itself fails."""
    (a, b, c, d), expected = TURNS[turn]
    path = write_clip(tmp_path / "phone.mp4", width=96, height=48, codec="libx264", encoder=dict(qp="0"))
    info = dict(filename=str(path), label=0, start_index=0, modality="RGB")
    stored = np.stack(Compose(decoding_steps(DECODE_ALL, "pyav"))(dict(info))["imgs"])
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    struct.pack_into(">9i", content, start, *(round(x * 2**16) for x in (a, b, 0, c, d, 0, 0, 0)), 2**30)
    path.write_bytes(content)
    for decoder in DECODERS:
        decoded = Compose(decoding_steps(DECODE_ALL, decoder))(dict(info))
        assert np.array_equal(decoded["imgs"], expected(stored))
        assert decoded["img_shape"] == decoded["imgs"][0].shape[:2]


def test_efficient_decoding_takes_key_frames(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip.mp4", 33, codec="libx264", encoder=dict(g="10", sc_threshold="0"))
    every = dataset(tmp_path, "clip.mp4 0", pipeline=[*DECODE_ALL[:1], frames_of(range(33)), DECODE_ALL[2]])[0]["imgs"]
    pipeline = [DECODE_ALL[0], frames_of([0, 9, 10, 25, 32]), dict(DECODE_ALL[2], mode="efficient")]
    for decoder in DECODERS:
        taken = dataset(tmp_path, "clip.mp4 0", pipeline=pipeline, decoder=decoder)[0]["imgs"]
        assert np.array_equal(taken, [every[index] for index in (0, 0, 10, 20, 30)])


def frames_of(indices: Sequence[int]) -> Any:
    return lambda results: results | {"frame_inds": np.array(indices)}


def stream(path: Path) -> None:
    write_clip(path, 28, codec="libx264")


def tagged(path: Path) -> None:
    write_clip(path, 28, metadata=dict(rotate="90"))


def cut_out(path: Path) -> None:
    """By copying its packets from the last key frame before the cut on, which players hide."""
    whole = write_clip(path.with_name("whole.mp4"), 48, codec="libx264")
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy, cut = target.add_stream_from_template(stream), int(2 / stream.time_base)  # of 4.8 s
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, copy
                target.mux(packet)


@pytest.mark.parametrize(("name", "make"), [("stream.ts", stream), ("tag.mkv", tagged), ("part.mp4", cut_out)])
def test_what_decord_cannot_decode_names_pyav_which_auto_takes(
    name: str, make: Any, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    make(tmp_path / name)
    pipeline = [DECODE_ALL[0], frames_of([27, 3, 3, 0]), DECODE_ALL[2]]
    with pytest.raises(InputError) as caught:
        dataset(tmp_path, f"{name} 0", pipeline=pipeline, decoder="decord")[0]
    assert f"clip {tmp_path}/{name} cannot be decoded by decord (" in str(caught.value)
    assert '), but decoder="pyav" can' in str(caught.value)
    assert "\n" not in str(caught.value)
    frames = [dataset(tmp_path, f"{name} 0", pipeline=pipeline, decoder=one)[0]["imgs"] for one in ("auto", "pyav")]
    assert np.array_equal(*frames)
    if make is cut_out:
        whole = dataset(tmp_path, "whole.mp4 0", pipeline=[DECODE_ALL[0], frames_of([47, 23, 23, 20]), DECODE_ALL[2]])
        assert np.array_equal(frames[0], whole[0]["imgs"])
    arguments = [str(tmp_path / "list.txt"), "--root", str(tmp_path), "--workers", "0", "--decoder"]
    write_list(tmp_path / "list.txt", [f"{name} 0"])
    capfd.readouterr()
    assert [check([*arguments, decoder]) for decoder in ("decord", "auto", "pyav")] == [1, 0, 0]
    shown = capfd.readouterr()
    assert f"line 1: {name} cannot be decoded by decord (" in shown.out
    assert "clips are decoded by decord: it imports; what it cannot decode, by pyav" in shown.out
    assert not [line for line in shown.err.splitlines() if line and "check:" not in line]  # no library's own words


@pytest.fixture
def no_choice_yet() -> Iterator[None]:
    find_decoder.cache_clear()
    said.clear()
    yield
    find_decoder.cache_clear()


@pytest.mark.usefixtures("no_choice_yet")
def test_without_decord_pyav_decodes_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    with_decord = dataset(tmp_path, test_mode=True)[0]["inputs"]
    assert "clips are decoded by decord: it imports" in capfd.readouterr().out
    find_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "decord", None)
    datasets = [dataset(tmp_path, test_mode=True) for _ in range(2)]
    assert capfd.readouterr().out.count("clips are decoded by pyav: decord does not import (") == 1
    assert [type(step).__name__ for step in datasets[0].pipeline.transforms[:3]] == [
        "ClipInit", "SampleFrames", "ClipDecode"
    ]  # fmt: skip
    del with_decord
    assert datasets[1][0]["inputs"].shape == (1, 3, 4, 32, 32)
    find_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match="decord does not import .*, nor does PyAV"):
        find_decoder()
