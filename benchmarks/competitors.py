"""One model from each library, with the same weights, seen to compute the same function."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hvt_backbones as hvt
from hvt_backbones.ops import use_attention

CLASSES = 1000


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


class WithAttention(nn.Module):
    """A model under one implementation of window attention."""

    def __init__(self, model: nn.Module, implementation: str) -> None:
        super().__init__()
        self.model, self.implementation = model, implementation

    def forward(self, images: Tensor) -> Tensor:
        with use_attention(self.implementation):
            return self.model(images)


def with_attention(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """ "hvt-NAME": copies of a model of ours under implementations of window attention."""
    return {f"hvt-{name}": WithAttention(copy.deepcopy(model), name) for name in names}


def build_competitors(name: str, attention: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The model `name` of each library on the CPU, in float32, without stochastic depth: to be copied, not run.

    "hvt" and "timm" are as these libraries come, "timm-fused" and "timm-unfused" have timm's fused attention switched
    the other way in every module that knows both, "hvt-NAME" is ours under an implementation named in `attention`.
    """
    peers = MODELS[name]
    theirs = build_timm(peers.timm)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            # norms and biases start as ones and zeros, position tables near zero: a mistake in them would not show
            if parameter.dim() == 1 or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = hvt.create_classifier(name, num_classes=CLASSES, drop_path_rate=0.0)
    hvt.load_weights(ours, theirs.state_dict(), layout="timm")

    found: dict[str, nn.Module] = {"hvt": ours}
    found |= with_attention(ours, attention)
    found["timm"] = theirs
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
    import torchvision

    model = getattr(torchvision.models, peers.torchvision)(num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0  # the builders take no argument for it
    size = peers.window_size
    model.load_state_dict(hvt.convert_state_dict(weights, to="torchvision", layout="timm", window_size=size))
    return model


def check_equal(
    models: Mapping[str, nn.Module], images: Tensor, limit: float, *, reference: str = "timm"
) -> dict[str, float]:
    """Compare outputs (eval) and gradients of the images (train) with those of `reference` by max|a - b| / max|b|.

    Args:
        models: each gives a tensor, or several.

    Returns:
        name -> the largest of the errors.

    Raises:
        AssertionError: a competitor computes something else, so its time means nothing.
    """

    def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
        results = model(images)
        return [results] if isinstance(results, Tensor) else list(results)

    found: dict[str, list[Tensor]] = {}
    for name, prototype in models.items():
        model = copy.deepcopy(prototype).to(images.device)
        model.eval()
        with torch.inference_mode():
            values = [x.clone() for x in outputs(model, images)]
        inputs = images.clone().requires_grad_()
        model.train()
        loss = sum(x.square().sum() for x in outputs(model, inputs))
        found[name] = [*values, *torch.autograd.grad(loss, inputs)]
    errors = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(tensors, found[reference], strict=True))
        for name, tensors in found.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < limit}
    if wrong:
        raise AssertionError(f"not the function that {reference} computes: {wrong}, limit {limit}")
    return errors


def count_flops(name: str, image_size: int) -> dict[str, int]:
    """Operations (2 per multiply-add) of one image in products and convolutions, counted on timm's unfused model.

    A training step counts as three times the forward pass, as is usual: every product and convolution has two in the
    backward pass. (torch's own count of the backward pass takes depthwise convolutions for dense ones.)
    """
    model = with_fused_attention(build_timm(MODELS[name].timm), False).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    forward = counter.get_total_flops()
    return {"inference": forward, "train": 3 * forward}
