"""Counters of multiply-adds agree with each other and with the papers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from calflops import calculate_flops
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from thop import profile
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hvt_backbones as hvt
from hvt_backbones.layers.attention import attend
from hvt_backbones.variants import VARIANTS


def by_torch(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def by_thop(model: nn.Module, x: Tensor) -> float:
    return profile(model, inputs=(x,), verbose=False)[0]


def by_calflops(model: nn.Module, x: Tensor) -> float:
    silent = {"print_results": False, "print_detailed": False, "output_as_string": False}
    return calculate_flops(model, input_shape=tuple(x.shape), **silent)[1]


def by_ptflops(model: nn.Module, x: Tensor) -> float:
    silent = {"print_per_layer_stat": False, "verbose": False, "as_strings": False}
    return get_model_complexity_info(model, tuple(x.shape[1:]), backend="pytorch", **silent)[0]


def by_fvcore(model: nn.Module, x: Tensor) -> float:
    return FlopCountAnalysis(model, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


# those of layers alone, and those that also see some or all of attention's own products
OF_LAYERS: list[Callable] = [by_thop, by_fvcore]
OF_PRODUCTS: list[Callable] = [by_torch, by_calflops, by_ptflops]


def counted(counters: list[Callable], model: nn.Module, x: Tensor) -> dict[str, float]:
    """Multiply-adds in G, within 5 % of each other."""
    counts = {count.__name__: count(copy.deepcopy(model), x) / 1e9 for count in counters}
    assert max(counts.values()) < 1.05 * min(counts.values()), counts
    return counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["swin_tiny", "swinv2_tiny_window8", "pvt_v2_b2", "pvt_v2_b2_li", "twins_pcpvt_small", "twins_svt_small"]
)
def test_counters_agree_with_each_other_and_the_papers(name: str) -> None:
    """At these windows attention's own products are a few in a hundred."""
    size = VARIANTS[name].input_size
    counts = counted(OF_LAYERS + OF_PRODUCTS, hvt.create_classifier(name).eval(), torch.randn(1, 3, size, size))
    assert all(abs(count / VARIANTS[name].flops_g - 1) < 0.1 for count in counts.values()), counts


def test_torch_counts_the_products_of_attention() -> None:
    q = torch.randn(2, 3, 10, 8)
    k = v = torch.randn(2, 3, 5, 8)
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 10 * 5 * 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_counters_agree_on_clips() -> None:
    """A window of 392 tokens: attention's products are a tenth, which counters of layers do not see."""
    model, x = hvt.create_classifier("video_swin_tiny").eval(), torch.randn(1, 3, 8, 112, 112)
    layers = counted(OF_LAYERS, model, x)
    products = counted([by_torch, by_ptflops], model, x)
    assert 1 < min(products.values()) / max(layers.values()) < 1.15
