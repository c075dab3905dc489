"""A pooled linear head over any backbone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .backbone import Backbone, is_whole, param_groups
from .errors import InputError


class Classifier(nn.Module):
    """Global average pooling and a linear layer over the last map, as all families classify.

    Args:
        backbone: built with its last stage as the only output.
        num_classes: width of the output; 0 makes `forward` return the pooled features.
    """

    def __init__(self, backbone: Backbone, num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.reset_head(num_classes)

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by a new one for `num_classes` classes, on the device and dtype of the backbone."""
        if not is_whole(num_classes, 0):
            raise InputError(f"num_classes must be a whole number from 0, got {num_classes!r}")
        self.num_classes = num_classes
        if num_classes == 0:
            self.head: nn.Module = nn.Identity()
            return
        like = next(self.backbone.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, [T,] H, W) images or clips -> (B, num_features, [T',] H', W'), the last normed map."""
        return self.backbone(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, [T',] H', W') -> (B, num_classes), or the pooled features (B, num_features)."""
        pooled = features.flatten(2).mean(-1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, [T,] H, W) images or clips -> (B, num_classes) logits."""
        return self.forward_head(self.forward_features(images))

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def set_sequential_attention(self, max_logits: int | None) -> None:
        self.backbone.set_sequential_attention(max_logits)

    def freeze_stages(self, count: int) -> None:
        self.backbone.freeze_stages(count)

    def param_groups(
        self, *, lr: float | None = None, weight_decay: float = 0.05, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """As `Backbone.param_groups`; the head is one layer above the last block."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layer_ids()}
        head = max(layers.values()) + 1
        layers |= {name: head for name, _ in self.named_parameters() if name.startswith("head.")}
        return param_groups(self, layers, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
