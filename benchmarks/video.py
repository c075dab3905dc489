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
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

import hvt_backbones as hvt
from hvt_backbones.errors import exit_on_input_error

from .comparison import Row, Settings, command_line, compare_all, parse
from .competitors import build_ours, check_equal
from .dense import MODES, measure_maps

SIZES = ((32, 224, 224), (16, 112, 112))
WINDOW = (8, 7, 7)
# name -> what it is made with here and elsewhere
MODELS: dict[str, Mapping[str, Any]] = {
    "video_swin_tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
}


class Features(nn.Module):
    """torchvision's classifier up to its pooling: clips (B, C, T, H, W) -> (B, C', T', H', W')."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.features, self.norm = classifier.patch_embed, classifier.features, classifier.norm

    def forward(self, clips: Tensor) -> Tensor:
        return self.norm(self.features(self.patch_embed(clips))).movedim(-1, 1)


def build_competitors(name: str, attention: Sequence[str] = ()) -> tuple[dict[str, nn.Module], list[str]]:
    """The backbone `name` of each framework on the CPU, in float32, without stochastic depth: to be copied, not run.

    Each gives the last map of a clip, as recognisers take it.

    Returns:
        The models, and the names of those that are missing because their framework is not installed.
    """
    numbers = MODELS[name]
    found, missing = build_ours("video_swin_tiny", attention, out_indices=(3,), **numbers)
    weights = found["hvt"].state_dict()
    if find_spec("mmaction") and find_spec("mmengine"):
        from runner.patches import import_framework

        import_framework("mmaction")
        from mmaction.models.backbones import SwinTransformer3D

        arch = {"embed_dims": numbers["embed_dim"], "depths": numbers["depths"], "num_heads": numbers["num_heads"]}
        found["mmaction2"] = SwinTransformer3D(arch, pretrained2d=False, drop_path_rate=0.0, window_size=WINDOW)
        found["mmaction2"].load_state_dict(hvt.convert_state_dict(weights, to="mmaction2", window_size=WINDOW))
    else:
        missing.append("mmaction2")
    classifier = SwinTransformer3d(patch_size=[2, 4, 4], window_size=list(WINDOW), stochastic_depth_prob=0.0, **numbers)
    head = {key: tensor for key, tensor in classifier.state_dict().items() if key.startswith("head.")}
    classifier.load_state_dict(hvt.convert_state_dict(weights, to="torchvision", window_size=WINDOW) | head)
    found["torchvision"] = Features(classifier)
    return found, missing


def measure_model(name: str, clip_size: tuple[int, int, int], settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    prototypes, missing = build_competitors(name, settings.options.attention)
    clips = torch.randn(settings.options.batch, 3, *clip_size).to(settings.device)
    errors = check_equal(prototypes, clips[:1], reference="hvt")
    yield from measure_maps(name, prototypes, missing, clips, errors, settings, with_flops=True)


def size(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    frames, height, width = map(int, match.groups()) if match else (0, 0, 0)
    if not (frames and height and width) or frames % 2 or height % 4 or width % 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be FRAMESxHEIGHTxWIDTH, frames a multiple of 2, sides of 4, such as 32x224x224"
        )
    return frames, height, width


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    description = "Compare our Video Swin with mmaction2's and torchvision's."
    parser = command_line("video", description, MODELS, MODES, batch=1, rounds=10)
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=list(SIZES), metavar="TxHxW", help="of clips: 32x224x224 16x112x112"
    )
    return compare_all("video", "peer", parse(parser, argv, MODELS), argv, measure_model)


if __name__ == "__main__":
    raise SystemExit(main())
