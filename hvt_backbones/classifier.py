"""A pooled linear head over any backbone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from .backbone import Backbone, Layered, is_whole
from .errors import InputError


class Classifier(Layered):
    """Global average pooling and a linear layer over the last map, as all families classify.

    Args:
        backbone: built with its last stage as the only output.
        num_classes: width of the output; 0 makes `forward` return the pooled features.
    """

    def __init__(self, backbone: Backbone, num_classes: int = 1000) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.global_pool = "avg"
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The linear layer, an `nn.Identity` where there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, on the device and dtype of the backbone.

        Args:
            num_classes: as in the constructor.
            global_pool: "avg", or, without classes, "" for the map as it is; None leaves it as it was. The words are
                timm's.

        Raises:
            InputError: another value of either, or classes without pooling.
        """
        if not is_whole(num_classes, 0):
            raise InputError(f"num_classes must be a whole number from 0, got {num_classes!r}")
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", "") or (num_classes and not pool):
            raise InputError(f'global_pool is {pool!r}: give "avg", or with num_classes=0 "" for the map as it is')
        self.num_classes, self.global_pool = num_classes, pool
        if num_classes == 0:
            self.head: nn.Module = nn.Identity()
            return
        like = next(self.backbone.parameters())
        self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, [T,] H, W) images or clips -> (B, num_features, [T',] H', W'), the last normed map."""
        return self.backbone(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, num_features, [T',] H', W') -> (B, num_classes), or the pooled features (B, num_features)."""
        pooled = features.flatten(2).mean(-1) if self.global_pool else features
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

    def layer_ids(self) -> Iterator[tuple[str, int]]:
        """As `Backbone.layer_ids`; the head is one layer above the last block."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layer_ids()}
        yield from layers.items()
        yield from ((f"head.{name}", max(layers.values()) + 1) for name, _ in self.head.named_parameters())
