"""Drawn clips in the layout of Kinetics: one shape that moves, in one of 8 ways that no single frame tells apart.

Place across, place down, turn and size of the shape are each one of a cycle of evenly spaced values. The class says
which of the four goes through its cycle, and to which side; at the end the first value comes again. The other three
keep one value of theirs. So a single frame is distributed alike in all 8 classes. Any `STEPS` frames of every
`INTERVAL` show the whole cycle, whichever they begin with, and as a set they are distributed alike in both classes of a
pair: whoever does not know their order sees which of the four changes, but not to which side, and is right about half
of the clips at most.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from hvt_backbones.atomic import whole_folder
from hvt_backbones.errors import InputError

from .shapes import GROUNDS, KINDS, draw_ground, draw_shape, scene_generator

Generator = np.random.Generator
# name -> which of place across, place down, turn and size changes, and to which side
MOTIONS = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (1, -1),
    "down": (1, 1),
    "counterclockwise": (2, -1),
    "clockwise": (2, 1),
    "shrink": (3, -1),
    "grow": (3, 1),
}
STEPS, INTERVAL = 8, 2  # frames that a model sees, and from one to the next
ROUND = STEPS * INTERVAL
FRAMES, RATE = 3 * ROUND, 20  # of a clip, and per second
HEIGHT, WIDTH = 48, 60  # pixels
REACH = 18.0  # pixels across and down
TURN = math.pi
SIZES = (12.0, 30.0)  # pixels
CODECS = {  # the first that is there
    # with "crf" the same frames became other bytes now and then
    "libx264": {"qp": "18", "g": "12", "preset": "veryfast"},
    "mpeg4": {"qmax": "4", "g": "12"},
}


def draw_states(rng: Generator, motion: str) -> NDArray:
    """Of each frame of a round the place across and down, turn and size, each from 0 to below 1: (ROUND, 4)."""
    axis, sign = MOTIONS[motion]
    states = np.tile(rng.uniform(size=4), (ROUND, 1))
    states[:, axis] = (states[:, axis] + sign * np.arange(ROUND) / ROUND) % 1
    return states


def draw_clip(rng: Generator, motion: str) -> NDArray[np.uint8]:
    """The frames of one round, (ROUND, HEIGHT, WIDTH, 3), of a motion that is a key of `MOTIONS`."""
    ground = 0.5 * draw_ground(rng, str(rng.choice(list(GROUNDS))), HEIGHT, WIDTH)
    middle = np.array([WIDTH / 2, HEIGHT / 2]) + rng.uniform(-2, 2, 2)
    shape = draw_shape(rng, str(rng.choice(list(KINDS))), middle, SIZES[0])
    color = np.array(shape.colors[0]) / max(shape.colors[0])
    colors = tuple(0.35 * color), tuple(0.4 * color + 0.6)  # so that every kind's turn is seen
    frames = []
    for across, down, turn, size in draw_states(rng, motion):
        now = dataclasses.replace(
            shape,
            center=tuple(middle + REACH * (np.array([across, down]) - 0.5)),
            size=SIZES[0] * (SIZES[1] / SIZES[0]) ** size,
            angle=shape.angle + TURN * turn,
            colors=colors,
        )
        frame = ground.copy()
        now.paint(frame, now.coverage(HEIGHT, WIDTH))
        frames.append((frame * 255).round().astype(np.uint8))
    return np.stack(frames)


def write_clips(folder: Path, *, train: int, val: int, seed: int = 0) -> Path:
    """Write clips as `folder/videos_{train,val}/MOTION/*.mp4`, and lists of them as Kinetics-400's.

    Args:
        folder: one that holds something is used as it is.
        train, val: how many, the same number of each motion: those above a multiple of 8 are left out.
        seed: other clips.

    Raises:
        InputError: they cannot be written.
    """
    with whole_folder(folder) as staging:
        if staging is None:
            return folder
        for split, count in {"train": train, "val": val}.items():
            lines = []
            for index, (label, motion) in itertools.product(range(count // len(MOTIONS)), enumerate(MOTIONS)):
                path = staging / f"videos_{split}" / motion / f"{index:05d}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                frames = draw_clip(scene_generator(seed, f"{split}/{motion}", index), motion)
                write_mp4(path, np.resize(frames, (FRAMES, *frames.shape[1:])))
                lines.append(f"{motion}/{path.name} {label}\n")
            (staging / f"kinetics400_{split}_list_videos.txt").write_text("".join(lines))
    return folder


def write_mp4(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write frames, (T, H, W, 3) with even H and W, as H.264, or as MPEG-4 where PyAV has no encoder for that.

    Raises:
        InputError: PyAV has neither, or a decoder gives back another number of frames.
    """
    codec = next((name for name in CODECS if name in av.codecs_available), None)
    if codec is None:
        raise InputError(f"this PyAV encodes none of {', '.join(CODECS)}: install its wheel, which does")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=CODECS[codec])
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # which bytes come out must not depend on the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        decoded = sum(1 for _ in container.decode(video=0))
    if decoded != len(frames):
        raise InputError(f"{path} has {decoded} frames of {len(frames)} that were written: install another PyAV")
