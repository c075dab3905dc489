"""A tiny Kinetics and a tiny recognizer, for all tests of the session."""

# ruff: noqa: C408 - as configurations are written
from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.dense_runs import untouched_mmengine, write_config

SIDE, FRAMES, CLASSES = 64, 16, 3
COLOURS = ((220, 40, 40), (40, 60, 220), (40, 200, 60))
BACKBONE = dict(
    type="HVTBackbone", name="video_swin_tiny", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
    window_size=(2, 4, 4), drop_path_rate=0.0, out_indices=(3,),
)  # fmt: skip
MODEL = dict(
    type="Recognizer3D",
    backbone=BACKBONE,
    cls_head=dict(type="I3DHead", in_channels=64, num_classes=CLASSES, spatial_type="avg", average_clips="prob"),
    data_preprocessor=dict(
        type="ActionDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.4, 57.1, 57.4], format_shape="NCTHW"
    ),
)


def write_clip(
    path: Path, frames: int = FRAMES, *, label: int = 0, codec: str = "mpeg4", options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None, times: Sequence[int] | None = None, rate: int = 10,
    metadata: dict[str, str] | None = None, **settings: Any,
) -> Path:  # fmt: skip
    """A clip of SIDE x SIDE pixels: a square of the class's colour that moves, brighter with each frame.

    `options` are those of the file, `encoder` and `settings` (width, pix_fmt ...) of the encoder; `times` of the frames
    are in ms.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=encoder or {})
        for name, value in ({"width": SIDE, "height": SIDE, "pix_fmt": "yuv420p"} | settings).items():
            setattr(stream.codec_context, name, value)
        stream.metadata.update(metadata or {})
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            picture = np.full((stream.height, stream.width, 3), 8 * index % 256, dtype=np.uint8)
            picture[16:48, 2 * index % 32 : 2 * index % 32 + 32] = COLOURS[label % len(COLOURS)]
            picture[-7:, ::3] = COLOURS[index % len(COLOURS)]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            if times:
                frame.pts, frame.time_base = times[index], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """A file of the right kind without a picture in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw_kinetics(root: Path, counts: dict[str, int]) -> Path:
    """Kinetics' layout below `root`: {"train": 6, "val": 4}; one folder of the clips has a blank in its name."""
    for split, count in counts.items():
        lines = []
        for index in range(count):
            label = index % CLASSES
            name = f"class {label}/{index:03}.mp4"
            write_clip(root / f"videos_{split}" / name, label=label)
            lines.append(f"{name} {label}")
        write_list(root / f"{split}.txt", lines)
    return root


def write_list(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def damaged(kinetics: Path, folder: Path, *names: str) -> Path:
    """A copy of the data in which the clips `names` are empty."""
    root = shutil.copytree(kinetics, folder / "kinetics")
    for name in names:
        (root / name).write_bytes(b"")
    return root


def steps(training: bool) -> list[dict[str, Any]]:
    sampling = (
        dict(clip_len=4, frame_interval=2, num_clips=1)
        if training
        else dict(clip_len=4, frame_interval=2, num_clips=2, test_mode=True)
    )
    return [
        dict(type="DecordInit"),
        dict(type="SampleFrames", **sampling),
        dict(type="DecordDecode"),
        dict(type="Resize", scale=(-1, 32)),
        *([dict(type="RandomResizedCrop"), dict(type="Resize", scale=(32, 32), keep_ratio=False)] if training else
          [dict(type="ThreeCrop", crop_size=32)]),
        dict(type="FormatShape", input_format="NCTHW"),
        dict(type="PackActionInputs"),
    ]  # fmt: skip


def loader(split: str, root: str) -> dict[str, Any]:
    training = split == "train"
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=training),
        dataset=dict(
            type="ClipDataset",
            ann_file=f"{root}/{split}.txt",
            data_prefix=dict(video=f"{root}/videos_{split}"),
            test_mode=not training,
            pipeline=steps(training),
        ),
    )


def settings(root: str) -> dict[str, Any]:
    return dict(
        custom_imports=dict(imports=["hvt_backbones.openmmlab", "video.clips"]),
        default_scope="mmaction",
        model=MODEL,
        train_dataloader=loader("train", root),
        val_dataloader=loader("val", root),
        test_dataloader=loader("val", root),
        val_evaluator=dict(type="AccMetric", metric_options=dict(top_k_accuracy=dict(topk=(1, 2)))),
        test_evaluator=dict(type="AccMetric", metric_options=dict(top_k_accuracy=dict(topk=(1, 2)))),
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=2),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
        auto_scale_lr=dict(enable=False, base_batch_size=16),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="gloo")),
    )


@pytest.fixture(scope="session")
def kinetics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips to train on, five to test on."""
    return draw_kinetics(tmp_path_factory.mktemp("data") / "kinetics", {"train": 6, "val": 5})


@pytest.fixture(scope="session")
def config(kinetics: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recognizer of a few thousand parameters."""
    return write_config(tmp_path_factory.mktemp("configs") / "tiny_video-swin.py", settings(str(kinetics)))


@pytest.fixture(autouse=True)
def mmengine_as_before() -> Iterator[None]:
    with untouched_mmengine():
        yield


@pytest.fixture(scope="session")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a training run of two epochs, which ended with an evaluation."""
    from video.train import main

    folder = tmp_path_factory.mktemp("trained")
    with untouched_mmengine():
        assert main([str(config), "--work-dir", str(folder), "--device", "cpu", "--amp", "--auto-scale-lr"]) == 0
    return folder
