"""Our Video Swin beside mmaction2's and torchvision's: time, memory, share of the matrix-product rate.

    python -m benchmarks.video --out video.json
    python -m benchmarks.video --device cuda --dtype bfloat16 --batch 4

As in `dense`, whose measurements these are: all competitors of a row live in one process, have the same weights, are
first seen to compute the same map and gradients, and are then timed in turn, forward alone, or forward and backward
from a given gradient of the map.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hvt_backbones.errors import ArgumentParser, exit_on_input_error

from .command_line import add_measuring, known_models
from .competitors import check_equal
from .dense import MODES, Settings, add_attention, compare_all, error_limit, measure_modes
from .video_competitors import MODELS, build_competitors, count_work

SIZES = ((32, 224, 224), (16, 112, 112))


def measure_model(
    name: str, clip_size: tuple[int, int, int], modes: Sequence[str], settings: Settings
) -> Iterator[dict[str, Any]]:
    """One row per mode: times and peak memory of all competitors."""
    torch.manual_seed(0)
    prototypes, missing = build_competitors(name)
    add_attention(prototypes, settings)
    clips = torch.randn(settings.batch, 3, *clip_size).to(settings.device)
    errors = check_equal(prototypes, clips[:1], limit=error_limit(), reference="hvt")
    flops, shape = count_work(name, clip_size)
    for mode, best, figures in measure_modes(prototypes, clips, [shape], modes, settings):
        yield {
            "model": name,
            "image_size": list(clip_size),
            "mode": mode,
            "batch": settings.batch,
            "flops": flops[mode] * settings.batch,
            "peer_best": best,
            "missing": missing,
            "competitors": {key: {**entry, "error_to_hvt": errors[key]} for key, entry in figures.items()},
        }


def size(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    frames, height, width = map(int, match.groups()) if match else (0, 0, 0)
    if not (frames and height and width) or frames % 2 or height % 4 or width % 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be FRAMESxHEIGHTxWIDTH, frames a multiple of 2, sides of 4, such as 32x224x224"
        )
    return frames, height, width


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.video", description="Compare our Video Swin with mmaction2's and torchvision's."
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=list(SIZES), metavar="TxHxW", help="of clips: 32x224x224 16x112x112"
    )
    add_measuring(parser, batch=1, rounds=10)
    options = parser.parse_args(argv)
    known_models(options.models, MODELS)
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    return compare_all("video", parse(argv), argv, measure_model)


if __name__ == "__main__":
    raise SystemExit(main())
