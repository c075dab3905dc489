"""Parameters and floating-point operations of a detector, segmentor or recognizer, by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

TOTAL = "total"


def measure(model: nn.Module, shape: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Count in one forward pass over one image or clip.

    FLOPs are multiply-adds of convolutions and matrix products, those of attention among them, as papers count. A
    two-stage detector runs its second stage on the proposals that the first one makes of noise, 1000 as a rule, and its
    mask head on 100 of them; what only training uses (an auxiliary head) has parameters and no FLOPs.

    Args:
        model: of mmdet, mmseg or mmaction, in eval mode, on any device.
        shape: (height, width) of the image, (frames, height, width) of the clip; the model pads it as any other.

    Returns:
        name of the part -> {"params": ..., "flops": ...}; the last is "total".
    """
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that PyTorch does not count
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        images = torch.randint(256, (3, *shape))
        clip = len(shape) == 3
        inputs = [images[None] if clip else images]  # of a clip, views of it
        data = model.data_preprocessor({"inputs": inputs, "data_samples": [_sample(shape)]})
        with FlopCounterMode(display=False, custom_mapping={attention: _attention_flops}) as counter:
            # a recognizer stops after its backbone if it is not told
            model(data["inputs"], data["data_samples"], mode="tensor", **({"stage": "head"} if clip else {}))
    counts = counter.get_flop_counts()
    parts = {
        name: {"params": _parameters(part), "flops": _flops(counts, f"{type(model).__name__}.{name}")}
        for name, part in model.named_children()
        if _parameters(part)
    }
    parts[TOTAL] = {"params": _parameters(model), "flops": counter.get_total_flops() // 2}
    return parts


def _sample(shape: tuple[int, ...]) -> Any:
    from mmengine.structures import BaseDataElement

    sizes = {"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "scale_factor": (1.0, 1.0)}
    return BaseDataElement(metainfo=sizes)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of shapes."""
    return sdpa_flop_count(query, key, value)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _flops(counts: Mapping[str, Mapping[Any, int]], name: str) -> int:
    """A head whose methods are called, and not the head, has only its layers in `counts`."""
    below = [key for key in counts if key == name or key.startswith(name + ".")]
    top = [key for key in below if not any(key.startswith(other + ".") for other in below)]
    return sum(sum(counts[key].values()) for key in top) // 2
