"""What the competitors of every comparison have in common: they are made the same, and seen to compute the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hvt_backbones as hvt
from hvt_backbones.ops import use_attention


class WithAttention(nn.Module):
    """A model under one implementation of window attention."""

    def __init__(self, model: nn.Module, implementation: str) -> None:
        super().__init__()
        self.model, self.implementation = model, implementation

    def forward(self, images: Tensor) -> Any:
        with use_attention(self.implementation):
            return self.model(images)


def with_attention(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """ "hvt-NAME": copies of a model of ours under implementations of window attention."""
    return {f"hvt-{name}": WithAttention(copy.deepcopy(model), name) for name in names}


@torch.no_grad()
def vary(model: nn.Module) -> None:
    """Move norms and biases, in place: they start as ones and zeros, so that a mistake in them would not show."""
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1 or "bias" in key:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def build_ours(name: str, attention: Sequence[str], **arguments: Any) -> tuple[dict[str, nn.Module], list[str]]:
    """Our backbone, without stochastic depth, under the name of each form that it has.

    "hvt" is `create_backbone`, whose maps are views of channels-last memory, "hvt-NAME" the same under an
    implementation of window attention, "HVTBackbone" its form for OpenMMLab, whose maps are contiguous.

    Returns:
        The models, and ["HVTBackbone"] where MMEngine is not installed.
    """
    ours = hvt.create_backbone(name, drop_path_rate=0.0, **arguments)
    vary(ours)
    found: dict[str, nn.Module] = {"hvt": ours, **with_attention(ours, attention)}
    if find_spec("mmengine") is None:
        return found, ["HVTBackbone"]
    from hvt_backbones.openmmlab import HVTBackbone

    adapter = HVTBackbone(name, drop_path_rate=0.0, **arguments)
    adapter.model.load_state_dict(ours.state_dict())
    return {**found, "HVTBackbone": adapter}, []


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    results = model(images)
    return [results] if isinstance(results, Tensor) else list(results)


def check_equal(models: Mapping[str, nn.Module], images: Tensor, *, reference: str) -> dict[str, float]:
    """Compare outputs (eval) and gradients of the images (train) with those of `reference` by max|a - b| / max|b|.

    They may differ by the rounding of float32, or that of tf32 where it is allowed.

    Args:
        models: each gives a tensor, or several.

    Returns:
        name -> the largest of the errors.

    Raises:
        AssertionError: a competitor computes something else, so its time means nothing.
    """
    limit = 1e-4 if torch.get_float32_matmul_precision() == "highest" else 2e-2
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


def dry_run(model: nn.Module, size: Sequence[int]) -> tuple[int, list[torch.Size]]:
    """Operations (2 per multiply-add) of one image or clip in products and convolutions, and shapes of what comes out.

    A forward pass. With the backward pass they are three times as many, as is usual: every product and convolution has
    two there. (torch's own count of the backward pass takes depthwise convolutions for dense ones.)
    """
    model = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, use_attention("reference"), torch.no_grad():
        results = outputs(model, torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops(), [x.shape[1:] for x in results]
