"""Our models beside timm's and torchvision's: time, share of the matrix-product rate, and peak training memory.

    python -m benchmarks.peers --out peers.json
    python -m benchmarks.peers --device cuda --dtype bfloat16 --batch 128

All competitors of a row live in one process, have the same weights, are first seen to give the same outputs and
gradients, and are then timed in turn, see `measure.interleave`. timm is measured as it comes and with its fused
attention switched the other way where a model has it; the faster of the two is timm's best.

Stochastic depth and dropout are off: they would give each competitor random work of its own, and leave no outputs to
compare. Inference runs with weights and images of `--dtype`; a training step keeps float32 weights and uses autocast.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.errors import InputError, exit_on_input_error, whole_number

from . import measure
from .comparison import Row, Settings, command_line, compare_all, compare_modes, parse
from .competitors import check_equal, dry_run, vary, with_attention

CLASSES = 1000
MODES = ("inference", "train")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-5, momentum=0.9, foreach=True),
}


@dataclass(frozen=True)
class Peers:
    """One model under each library's name, and the images it takes in the benchmark.

    Attributes:
        multiple: what the image size must be a multiple of, so that the libraries' treatment of borders, which
            differs, plays no part.
    """

    timm: str
    torchvision: str | None = None
    window_size: int | None = None
    image_size: int = 224
    multiple: int = 224


MODELS = {
    "swin_tiny": Peers("swin_tiny_patch4_window7_224", "swin_t", window_size=7),
    "swinv2_tiny_window8": Peers("swinv2_tiny_window8_256", "swin_v2_t", window_size=8, image_size=256, multiple=256),
    "pvt_v2_b2": Peers("pvt_v2_b2", multiple=32),
    "twins_svt_small": Peers("twins_svt_small"),
}


def build_competitors(name: str, attention: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The model `name` of each library on the CPU, in float32, without stochastic depth: to be copied, not run.

    "hvt" and "timm" are as these libraries come, "timm-fused" and "timm-unfused" have timm's fused attention switched
    the other way in every module that knows both, "hvt-NAME" is ours under an implementation named in `attention`.
    """
    peers = MODELS[name]
    theirs = build_timm(peers.timm)
    vary(theirs)
    ours = hvt.create_classifier(name, num_classes=CLASSES, drop_path_rate=0.0)
    hvt.load_weights(ours, theirs.state_dict(), layout="timm")

    found: dict[str, nn.Module] = {"hvt": ours, **with_attention(ours, attention), "timm": theirs}
    flags = {module.fused_attn for module in theirs.modules() if hasattr(module, "fused_attn")}
    if False in flags:
        found["timm-fused"] = with_fused_attention(theirs, True)
    if True in flags:
        found["timm-unfused"] = with_fused_attention(theirs, False)
    if peers.torchvision:
        found["torchvision"] = _build_torchvision(peers, theirs.state_dict())
    return found


def build_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0)


def with_fused_attention(model: nn.Module, enable: bool) -> nn.Module:
    """A copy of timm's `model` in which every attention that has a fused path does, or does not, take it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = enable
    return model


def _build_torchvision(peers: Peers, weights: Mapping[str, Tensor]) -> nn.Module:
    model = getattr(torchvision.models, peers.torchvision)(num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0  # the builders take no argument for it
    size = peers.window_size
    model.load_state_dict(hvt.convert_state_dict(weights, to="torchvision", layout="timm", window_size=size))
    return model


def count_flops(name: str, image_size: int) -> dict[str, int]:
    """Operations of one image in each mode, counted on timm's unfused model."""
    model = with_fused_attention(build_timm(MODELS[name].timm), False)
    forward, _ = dry_run(model, (image_size, image_size))
    return {"inference": forward, "train": 3 * forward}


def inference(prototype: nn.Module, images: Tensor, settings: Settings) -> measure.Work:
    model = copy.deepcopy(prototype).to(settings.device, settings.dtype).eval()
    images = images.to(settings.dtype)

    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def training_step(prototype: nn.Module, images: Tensor, targets: Tensor, settings: Settings) -> measure.Work:
    """Forward, cross entropy, backward, one update by the optimizer's foreach form, gradients freed."""
    model = copy.deepcopy(prototype).to(settings.device).train()
    optimizer = OPTIMIZERS[settings.options.optimizer](model.parameters())

    def call() -> None:
        with settings.autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call


def measure_model(name: str, size: None, settings: Settings) -> Iterator[Row]:
    """One row per mode: times of all competitors, and of a training step also their peak memory."""
    torch.manual_seed(0)
    side, batch = settings.options.image_size or MODELS[name].image_size, settings.options.batch
    prototypes = build_competitors(name, settings.options.attention)
    images = torch.randn(batch, 3, side, side).to(settings.device)
    targets = torch.randint(CLASSES, (batch,)).to(settings.device)
    errors = check_equal(prototypes, images[:1], reference="timm")
    flops = count_flops(name, side)
    works = {
        "inference": partial(inference, images=images, settings=settings),
        "train": partial(training_step, images=images, targets=targets, settings=settings),
    }
    timms = [key for key in prototypes if key.startswith("timm")]
    for mode, best, figures in compare_modes(
        prototypes, works, settings, rivals=timms, label="timm", without_memory=["inference"]
    ):
        for key, entry in figures.items():
            entry["images_per_s"] = batch / entry["median_s"]
            entry["error_to_timm"] = errors[key]
            if mode == "train":
                entry["peak_training_bytes"] = entry.pop("peak_bytes")
        yield {
            "model": name,
            "mode": mode,
            "image_size": side,
            "batch": batch,
            "flops": flops[mode] * batch,
            "timm_best": best,
            "competitors": figures,
        }


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(
        "peers", "Compare our models with timm's and torchvision's.", MODELS, MODES, batch=4, rounds=15
    )
    parser.add_argument("--image-size", type=whole_number(1), help="default: 224, for SwinV2 256")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="of the training step")
    options = parse(parser, argv, MODELS)
    for name in options.models:
        size, multiple = options.image_size, MODELS[name].multiple
        if size is not None and size % multiple:
            raise InputError(f"--image-size {size} does not suit {name}: give a multiple of {multiple}")
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    return compare_all("peers", "timm", read_options(argv), argv, measure_model)


if __name__ == "__main__":
    raise SystemExit(main())
