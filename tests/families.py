"""One tiny model per family, and images or clips for it, for tests that hold for all of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import hvt_backbones as hvt

PYRAMID = {"embed_dims": (8, 16, 24, 32), "depths": (2, 2, 1, 2), "sr_ratios": (8, 4, 2, 1), "num_heads": (1, 2, 3, 4)}
WINDOWED = {"embed_dim": 8, "depths": (2, 2, 1, 2), "num_heads": (1, 2, 4, 4), "window_size": 4}
TINY = {
    "swin": partial(hvt.SwinTransformer, **WINDOWED),
    "swinv2": partial(hvt.SwinTransformerV2, **WINDOWED),
    "pvt_v2": partial(hvt.PyramidVisionTransformerV2, **PYRAMID, mlp_ratios=(4, 4, 2, 2)),
    "pvt_v2_linear": partial(hvt.PyramidVisionTransformerV2, **PYRAMID, mlp_ratios=(4, 4, 2, 2), linear=True),
    "twins_pcpvt": partial(hvt.TwinsPCPVT, **PYRAMID, mlp_ratios=(4, 4, 2, 2)),
    "twins_svt": partial(hvt.TwinsSVT, **PYRAMID, mlp_ratios=(4, 4, 2, 2), window_sizes=(4, 4, 4, 4)),
    "video_swin": partial(hvt.VideoSwinTransformer, **{**WINDOWED, "window_size": (2, 4, 4)}),
}
FRAMES = 5  # of clips: tubes of two frames pad them, windows of two tubes are shifted over them


def images(family: str, *size: int, batch: int = 2, channels: int = 3) -> Tensor:
    """Images (B, C, H, W), for a video family clips (B, C, T, H, W)."""
    time = (FRAMES,) if family.startswith("video") else ()
    return torch.randn(batch, channels, *time, *size, generator=torch.Generator().manual_seed(3))


def tiny(family: str, **arguments) -> hvt.Backbone:
    """A backbone with random values in every parameter: zeros and ones hide mistakes."""
    return randomise(TINY[family](**{"drop_path_rate": 0.0, **arguments}))


def tiny_classifier(family: str, num_classes: int = 5, **arguments) -> hvt.Classifier:
    as_classifier = TINY[family].func.classifier_arguments(4)
    backbone = TINY[family](**{"drop_path_rate": 0.0, **as_classifier, **arguments}, out_indices=(3,))
    return randomise(hvt.Classifier(backbone, num_classes))


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(values + 1 if "norm" in name and name.endswith("weight") else values)
    return model
