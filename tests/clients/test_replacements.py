"""Libraries that put layers of their own in the place of the linear ones: adapters and quantisers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from ..families import images
from .models import SIZES, Make, every_model, layers, maps, replace, same, scalar


@every_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_low_rank_adapters_of_all_linear_layers(family: str, make: Make, training: bool) -> None:
    model = make(family).train(training)
    x = images(family, 45, 70)
    expected, linear = maps(model, x), layers(model, nn.Linear)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).train(training)
    assert sum(isinstance(m, LoraLayer) for m in adapted.modules()) == len(linear)
    same(maps(adapted, x), expected)  # their second factor is zero at first
    added = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(added) == 2 * len(linear)
    for name, parameter in added.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = maps(adapted, x)
    assert not torch.allclose(found[0], expected[0], rtol=0.1)
    scalar(found).backward()
    assert [name for name, parameter in added.items() if not parameter.grad.any()] == []
    same(maps(adapted.merge_and_unload(), x), found, near=1e-3)


def bitsandbytes_layers(model: nn.Module, make_layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """As transformers puts them in; they quantise their weights when they move."""
    for name, layer in layers(model, nn.Linear).items():
        new = make_layer(layer)
        new.bias = layer.bias
        replace(model, name, new)
    return model.to("cpu")


def eight_bits(layer: nn.Linear) -> nn.Module:
    new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return new


def four_bits(layer: nn.Linear) -> nn.Module:
    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    return new


def in_place(config: object) -> Callable[[nn.Module], nn.Module]:
    def quantise(model: nn.Module) -> nn.Module:
        quantize_(model, config)
        return model

    return quantise


QUANTISERS = {
    "torch": lambda model: quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
    "torchao weights": in_place(Int8WeightOnlyConfig()),
    "torchao": in_place(Int8DynamicActivationInt8WeightConfig()),
    "bitsandbytes 8": lambda model: bitsandbytes_layers(model, eight_bits),
    "bitsandbytes 4": lambda model: bitsandbytes_layers(model, four_bits),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@every_model
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_quantised_layers_are_those_that_run(family: str, make: Make, quantiser: str) -> None:
    model = make(family).eval()
    expected = copy.deepcopy(model)
    model = QUANTISERS[quantiser](model)
    # bitsandbytes would compile an operator of its own for half a minute
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name, layer in layers(expected, nn.Linear).items():
            new = model.get_submodule(name)
            assert (type(new), type(new.weight)) != (nn.Linear, nn.Parameter), f"{name} is as it was"
            # what the new layer multiplies by, in whatever form it keeps it
            weight = new(torch.eye(layer.in_features)).T
            layer.weight.copy_(weight if layer.bias is None else weight - layer.bias[:, None])
        for size in SIZES:
            x = images(family, *size)
            same(maps(model, x), maps(expected, x), near=0.1)  # most of them round activations too
