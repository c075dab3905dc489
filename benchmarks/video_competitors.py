"""One video backbone of each framework, with the same weights: the last map of a clip, as recognisers take it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hvt_backbones as hvt
from hvt_backbones.ops import use_attention

WINDOW = (8, 7, 7)


@dataclass(frozen=True)
class Video:
    """A backbone of ours, and the same one elsewhere.

    Attributes:
        name, arguments: ours, for `create_backbone` and `HVTBackbone`.
        mmaction2: arguments of its `SwinTransformer3D`.
        torchvision: arguments of its `SwinTransformer3d`.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mmaction2: Mapping[str, Any] = field(default_factory=dict)
    torchvision: Mapping[str, Any] = field(default_factory=dict)


def _swin(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> Video:
    """Ours, named "video_swin_tiny", made with these numbers, and the peers' with the same."""
    numbers = {"depths": list(depths), "num_heads": list(num_heads)}
    return Video(
        "video_swin_tiny",
        {"embed_dim": embed_dim, **numbers},
        {"arch": {"embed_dims": embed_dim, **numbers}, "pretrained2d": False},
        {"embed_dim": embed_dim, **numbers},
    )


MODELS = {"video_swin_tiny": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24))}


class Features(nn.Module):
    """torchvision's classifier up to its pooling: clips (B, C, T, H, W) -> (B, C', T', H', W')."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.patch_embed, self.features, self.norm = classifier.patch_embed, classifier.features, classifier.norm

    def forward(self, clips: Tensor) -> Tensor:
        return self.norm(self.features(self.patch_embed(clips))).movedim(-1, 1)


def build_competitors(name: str) -> tuple[dict[str, nn.Module], list[str]]:
    """The backbone `name` of each framework on the CPU, in float32, without stochastic depth: to be copied, not run.

    "hvt" is `create_backbone`, whose map is a view of channels-last memory, as torchvision's is; "HVTBackbone" is its
    form for OpenMMLab, whose map is contiguous, as mmaction2's is.

    Returns:
        The models, and the names of those that are missing because their framework is not installed.
    """
    video, missing = MODELS[name], []
    ours = hvt.create_backbone(video.name, drop_path_rate=0.0, out_indices=(3,), **video.arguments)
    with torch.no_grad():
        for key, parameter in ours.named_parameters():
            # norms and biases start as ones and zeros, position tables near zero: a mistake in them would not show
            if parameter.dim() == 1 or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = ours.state_dict()
    found: dict[str, nn.Module] = {"hvt": ours}
    if find_spec("mmengine"):
        from hvt_backbones.openmmlab import HVTBackbone

        found["HVTBackbone"] = HVTBackbone(video.name, drop_path_rate=0.0, out_indices=(3,), **video.arguments)
        found["HVTBackbone"].model.load_state_dict(weights)
    else:
        missing.append("HVTBackbone")
    if find_spec("mmaction") and find_spec("mmengine"):
        from runner.patches import import_framework

        import_framework("mmaction")
        from mmaction.models.backbones import SwinTransformer3D

        found["mmaction2"] = SwinTransformer3D(drop_path_rate=0.0, window_size=WINDOW, **video.mmaction2)
        found["mmaction2"].load_state_dict(hvt.convert_state_dict(weights, to="mmaction2", window_size=WINDOW))
    else:
        missing.append("mmaction2")
    if find_spec("torchvision"):
        from torchvision.models.video.swin_transformer import SwinTransformer3d

        classifier = SwinTransformer3d(
            patch_size=[2, 4, 4], window_size=list(WINDOW), stochastic_depth_prob=0.0, **video.torchvision
        )
        head = {key: tensor for key, tensor in classifier.state_dict().items() if key.startswith("head.")}
        classifier.load_state_dict(hvt.convert_state_dict(weights, to="torchvision", window_size=WINDOW) | head)
        found["torchvision"] = Features(classifier)
    else:
        missing.append("torchvision")
    return found, missing


def count_work(name: str, clip_size: tuple[int, int, int]) -> tuple[dict[str, int], tuple[int, ...]]:
    """Operations (2 per multiply-add) of one clip in products, for each mode, and the shape of its map.

    The backward pass counts as two forward passes, as is usual: every product has two there.
    """
    video = MODELS[name]
    model = hvt.create_backbone(video.name, out_indices=(3,), **video.arguments).to("meta").eval()
    with FlopCounterMode(display=False) as counter, use_attention("reference"), torch.no_grad():
        (features,) = model(torch.empty(1, 3, *clip_size, device="meta"))
    forward = counter.get_total_flops()
    return {"forward": forward, "backward": 3 * forward}, tuple(features.shape[1:])
