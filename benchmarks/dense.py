"""Our backbones beside mmdet's, mmseg's and timm's on images as detectors and segmentors take them: time and memory.

    python -m benchmarks.dense --out dense.json
    python -m benchmarks.dense --device cuda --dtype bfloat16 --batch 2

As in `peers`, all competitors of a row live in one process, have the same weights, are first seen to compute the same
maps and gradients, and are then timed in turn. A row is a backbone, an image size and a mode: `forward` under
`inference_mode()`, or `backward`, which is forward and backward from given gradients of the maps, without an update.
Weights are float32; other types are autocast's. Frameworks that are not installed are left out, and named. Where one
computes otherwise than another (norms between stages, masked padding), the two are in different rows, so that within a
row all do the same work.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.errors import exit_on_input_error

from . import measure
from .comparison import Row, Settings, command_line, compare_all, compare_modes, parse
from .competitors import build_ours, check_equal, dry_run, outputs

MODES = ("forward", "backward")
SIZES = ((800, 1216), (512, 512))

Arguments = Mapping[str, Any]
STAGES = {"depths": [3, 4, 6, 3], "num_heads": [1, 2, 5, 8], "mlp_ratios": [8, 8, 4, 4]}
PVT_V2 = {"num_layers": STAGES["depths"], "num_heads": STAGES["num_heads"], "mlp_ratios": STAGES["mlp_ratios"]}
PCPVT = {**STAGES, "embed_dims": [64, 128, 320, 512], "qkv_bias": True}
SVT = {
    "embed_dims": [64, 128, 256, 512], "depths": [2, 2, 10, 4], "num_heads": [2, 4, 8, 16], "mlp_ratios": [4] * 4,
    "sr_ratios": [8, 4, 2, 1], "windiow_sizes": [7] * 4, "qkv_bias": True, "norm_after_stage": True,
}  # fmt: skip
OF_SWIN = {"always_partition": True}  # or timm shrinks windows on small maps, which detectors' code never does


@dataclass(frozen=True)
class Dense:
    """A backbone of ours, and the same one elsewhere.

    Attributes:
        name, arguments: ours, for `create_backbone` and `HVTBackbone`.
        frameworks: "mmdet" or "mmseg" -> class among its backbones, and its arguments.
        timm, timm_arguments: timm's, for its `features_only`; None where timm computes something else.
        window: timm's Swin rolls a map before it pads it, the others after. The work is the same, the numbers are only
            where this window divides all maps: there the competitors are compared.
    """

    name: str
    arguments: Arguments = field(default_factory=dict)
    frameworks: Mapping[str, tuple[str, Arguments]] = field(default_factory=dict)
    timm: str | None = None
    timm_arguments: Arguments = field(default_factory=dict)
    window: int | None = None

    def checked_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The image size at which the competitors give the same numbers."""
        return image_size if self.window is None else (32 * self.window, 32 * self.window)


MODELS = {
    "swin_tiny": Dense(
        "swin_tiny",
        frameworks={"mmdet": ("SwinTransformer", {}), "mmseg": ("SwinTransformer", {})},
        timm="swin_tiny_patch4_window7_224",
        timm_arguments=OF_SWIN,
        window=7,
    ),
    "swinv2_tiny": Dense("swinv2_tiny_window8", timm="swinv2_tiny_window8_256", timm_arguments=OF_SWIN, window=8),
    "pvt_v2_b2": Dense(
        "pvt_v2_b2",
        {"patch_norm_eps": 1e-6, "sr_norm_eps": 1e-6},
        {"mmdet": ("PyramidVisionTransformerV2", PVT_V2)},
        timm="pvt_v2_b2",
    ),
    "twins_pcpvt_small": Dense(
        "twins_pcpvt_small", {"norm_eps": 1e-5}, {"mmseg": ("PCPVT", PCPVT)}, timm="twins_pcpvt_small"
    ),
    "twins_svt_small": Dense("twins_svt_small", {"norm_eps": 1e-5, "mask_padding": True}, {"mmseg": ("SVT", SVT)}),
    # timm's maps: no norm after a stage, and padding that is attended to
    "twins_svt_small_bare": Dense(
        "twins_svt_small", {"norm_after_stage": False, "mask_padding": False}, timm="twins_svt_small"
    ),
}


class Normed(nn.Module):
    """The channels-last maps of timm's Swin as detectors take them, each normed: images -> maps (B, C, H, W)."""

    def __init__(self, model: nn.Module, norms: list[nn.Module]) -> None:
        super().__init__()
        self.model, self.norms = model, nn.ModuleList(norms)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [norm(x).movedim(-1, 1) for norm, x in zip(self.norms, self.model(images), strict=True)]


def build_competitors(
    name: str, image_size: tuple[int, int], attention: Sequence[str] = ()
) -> tuple[dict[str, nn.Module], list[str]]:
    """The backbone `name` of each framework on the CPU, in float32, without stochastic depth: to be copied, not run.

    Args:
        image_size: (height, width), for which timm's Swin is built.

    Returns:
        The models, and the names of those that are missing because their framework is not installed.
    """
    dense = MODELS[name]
    found, missing = build_ours(dense.name, attention, **dense.arguments)
    ours = found["hvt"]
    for framework, (kind, arguments) in dense.frameworks.items():
        if find_spec(framework) is None:
            missing.append(framework)
            continue
        backbone = getattr(importlib.import_module(f"{framework}.models.backbones"), kind)
        found[framework] = backbone(drop_path_rate=0.0, **arguments)
        # all but buffers; a weight without its place shows when the maps are compared
        found[framework].load_state_dict(hvt.convert_state_dict(ours.state_dict(), to=framework), strict=False)
    if dense.timm:
        found["timm"] = _build_timm(dense, ours, image_size)
    return found, missing


def _build_timm(dense: Dense, ours: nn.Module, image_size: tuple[int, int]) -> nn.Module:
    swin = dense.window is not None
    sized = {"img_size": image_size} if swin else {}
    model = timm.create_model(dense.timm, features_only=True, drop_path_rate=0.0, **sized, **dense.timm_arguments)
    weights = ours.state_dict()
    if swin:  # has no norm for each output
        weights = {key: tensor for key, tensor in weights.items() if not re.match(r"stages\.\d\.norm\.", key)}
    weights = hvt.convert_state_dict(weights, to="timm")
    if hasattr(model, "model"):
        model.model.load_state_dict(weights, strict=False)
    else:  # a list of a model's modules, under names of its own
        model.load_state_dict(
            {re.sub(r"^(layers|stages)\.", r"\1_", key): weights[key] for key in weights}, strict=False
        )
    return Normed(model, [stage.norm for stage in ours.stages]) if swin else model


def forward(prototype: nn.Module, images: Tensor, settings: Settings) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device)
    model.eval()

    def call() -> None:
        with torch.inference_mode(), settings.autocast():
            model(images)

    return call


def forward_and_backward(
    prototype: nn.Module, images: Tensor, cotangents: Sequence[Tensor], settings: Settings
) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device)
    model.train()

    def call() -> None:
        with settings.autocast():
            maps = outputs(model, images)
        torch.autograd.backward(maps, [y.to(x.dtype) for x, y in zip(maps, cotangents, strict=True)])
        model.zero_grad(set_to_none=True)

    return call


def measure_maps(
    name: str, prototypes: Mapping[str, nn.Module], missing: Sequence[str], images: Tensor,
    errors: Mapping[str, float], settings: Settings, *, with_flops: bool = False,
) -> Iterator[Row]:  # fmt: skip
    """One row per mode: times and peak memory of all competitors, and how many operations they do."""
    batch, *_ = images.shape
    size = list(images.shape[2:])
    flops, shapes = dry_run(prototypes["hvt"], size)
    cotangents = [torch.randn(batch, *shape).to(settings.device) for shape in shapes]
    works = {
        "forward": partial(forward, images=images, settings=settings),
        "backward": partial(forward_and_backward, images=images, cotangents=cotangents, settings=settings),
    }
    rivals = [key for key in prototypes if not key.lower().startswith("hvt")]
    for mode, best, figures in compare_modes(prototypes, works, settings, rivals=rivals or ["hvt"], label="peer"):
        yield {
            "model": name,
            "image_size": size,
            "mode": mode,
            "batch": batch,
            **({"flops": (3 if mode == "backward" else 1) * flops * batch} if with_flops else {}),
            "peer_best": best if rivals else None,
            "missing": missing,
            "competitors": {key: {**entry, "error_to_hvt": errors[key]} for key, entry in figures.items()},
        }


def measure_model(name: str, image_size: tuple[int, int], settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    checked_size = MODELS[name].checked_size(image_size)
    checked, _ = build_competitors(name, checked_size, settings.options.attention)
    errors = check_equal(checked, torch.randn(1, 3, *checked_size).to(settings.device), reference="hvt")
    prototypes, missing = build_competitors(name, image_size, settings.options.attention)
    images = torch.randn(settings.options.batch, 3, *image_size).to(settings.device)
    yield from measure_maps(name, prototypes, missing, images, errors, settings)


def size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = map(int, match.groups()) if match else (0, 0)
    if not height or not width or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(f"{text!r} must be HEIGHTxWIDTH, both multiples of 32, such as 800x1216")
    return height, width


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    description = "Compare our backbones with mmdet's, mmseg's and timm's."
    parser = command_line("dense", description, MODELS, MODES, batch=1, rounds=10)
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=list(SIZES), metavar="HxW", help="of the images: 800x1216 512x512"
    )
    return compare_all("dense", "peer", parse(parser, argv, MODELS), argv, measure_model)


if __name__ == "__main__":
    raise SystemExit(main())
