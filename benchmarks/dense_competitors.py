"""One backbone of each framework, with the same weights: feature maps for detectors and segmentors.

Where a framework computes otherwise than another (norms between stages, masked padding), the two are in different rows,
so that within a row all do the same work.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import timm
import torch
from torch import Tensor, nn

import hvt_backbones as hvt

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


def build_competitors(name: str, image_size: tuple[int, int]) -> tuple[dict[str, nn.Module], list[str]]:
    """The backbone `name` of each framework on the CPU, in float32, without stochastic depth: to be copied, not run.

    "hvt" is `create_backbone`, whose maps are views of channels-last memory, "HVTBackbone" its form for OpenMMLab,
    whose maps are contiguous, as those of mmdet and mmseg are.

    Args:
        image_size: (height, width), for which timm's Swin is built.

    Returns:
        The models, and the names of those that are missing because their framework is not installed.
    """
    dense, missing = MODELS[name], []
    ours = hvt.create_backbone(dense.name, drop_path_rate=0.0, **dense.arguments)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            # norms and biases start as ones and zeros, position tables near zero: a mistake in them would not show
            if parameter.dim() == 1 or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    found: dict[str, nn.Module] = {"hvt": ours}
    if find_spec("mmengine"):
        from hvt_backbones.openmmlab import HVTBackbone

        found["HVTBackbone"] = HVTBackbone(dense.name, drop_path_rate=0.0, **dense.arguments)
        found["HVTBackbone"].model.load_state_dict(ours.state_dict())
    else:
        missing.append("HVTBackbone")
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
