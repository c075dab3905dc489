"""Attention part by part: the numbers of attention at once, and no more logits than were asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hvt_backbones as hvt
from hvt_backbones.layers.attention import SpatialReductionAttention
from hvt_backbones.layers.window_attention import token_places
from hvt_backbones.ops import IMPLEMENTATIONS, BiasTable, use_attention, window_attention
from hvt_backbones.ops.sequential import part_sizes, sequential

from .families import TINY, images, tiny, tiny_classifier
from .test_window_attention import MAPS, make, run

CPU = torch.device("cpu")
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def test_parts_have_at_most_so_many_logits_and_few_are_small() -> None:
    for shape in itertools.product((1, 2, 9, 144), (1, 3, 24), (1, 49, 1024), (1, 49, 1024)):
        *whole, keys = shape
        for limit in (1, 60, 10**4, 2**20, 2**26):
            sizes = part_sizes(*whole, keys, limit)
            logits = sizes[0] * sizes[1] * sizes[2] * keys
            assert all(1 <= size <= most for size, most in zip(sizes, whole, strict=True))
            assert logits <= max(limit, keys)
            if sizes != tuple(whole):  # one more window, head or query would be too many
                assert any(
                    logits // size * (size + 1) > limit for size, most in zip(sizes, whole, strict=True) if size < most
                )


@implementations
@pytest.mark.parametrize("limit", [70, 2000])
@pytest.mark.parametrize("options", [{}, {"cosine": True, "mask_padding": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_window_attention_in_parts(name: str, options: dict, limit: int, implementation: str) -> None:
    qkv, arguments = make(name, **options)
    with use_attention("reference"):
        expected = run(window_attention, qkv, arguments)
    with use_attention(implementation):
        found = run(partial(window_attention, max_logits=limit), qkv, arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@implementations
@pytest.mark.parametrize("limit", [4000, 10**9])
@pytest.mark.parametrize("family", TINY)
def test_families_in_parts(family: str, limit: int, implementation: str) -> None:
    """Padded and shifted maps, windows that shrink, values and every gradient."""
    more = {"mask_padding": True} if family == "twins_svt" else {}
    dense, classifier = tiny(family, **more).double(), tiny_classifier(family, **more).double()
    given = images(family, 75, 50, batch=1).double().requires_grad_()

    def maps_and_gradients() -> list[Tensor]:
        maps = [*dense(given), classifier(given)]
        leaves = [given, *dense.parameters(), *classifier.parameters()]
        return [*maps, *torch.autograd.grad(sum(x.pow(3).sum() for x in maps), leaves)]

    with use_attention(implementation):
        expected = maps_and_gradients()
        for model in (dense, classifier):
            model.set_sequential_attention(limit)
        for ours, theirs in zip(maps_and_gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10 * float(theirs.detach().abs().max()))
        with torch.inference_mode():
            torch.testing.assert_close(dense(given)[-1], expected[3], rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """Records the most numbers of a tensor that an operation makes, other than one of whole numbers for an index."""

    numbers = 0

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return result


def first_stage(family: str) -> hvt.Backbone:
    """With windows of 256 tokens a frame, or global attention over all, and a dropout of attention weights."""
    more: dict = {"window_size": (2, 16, 16) if family == "video_swin" else 16, "num_heads": (1,)}
    if "swin" not in family:
        more = {"embed_dims": (8,), "num_heads": (1,), "mlp_ratios": (4,), "sr_ratios": (1,)}
    if family == "twins_svt":
        more |= {"window_sizes": (16,), "mask_padding": True}
    return tiny(family, attn_drop_rate=0.1, depths=(2,), out_indices=(0,), **more)


# `bmm` works under no such mode; linear attention has 49 keys
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS.keys() - {"bmm"}))
@pytest.mark.parametrize("family", sorted(TINY.keys() - {"pvt_v2_linear"}))
def test_no_tensor_has_more_numbers_than_the_limit(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound, forward and backward, of logits and all that has their size: bias, mask, weights and gradients."""
    monkeypatch.setattr("hvt_backbones.layers.window_attention.LogPositionBias.HIDDEN", 4)  # units for each offset
    model, limit, given = first_stage(family), 2**14, images(family, 93, 62, batch=1)

    def largest() -> int:
        with Largest() as mode, use_attention(implementation):
            model(given)[0].square().sum().backward()
        return mode.numbers

    at_once = largest()
    model.set_sequential_attention(limit)
    most = max(limit, int(1.3 * given.numel()))  # the image, padded
    assert largest() <= most < at_once / 4


SHAPES = {"windows": (32, 32, 16, 8), "queries": (24, 24, 24, 0)}  # map, window and shift


@implementations
@pytest.mark.parametrize("what", SHAPES)
def test_six_tensors_of_that_size_are_alive_at_most(what: str, implementation: str) -> None:
    """Peak memory of forward and backward at a limit, over that at a smaller one, where all else is the same."""
    from benchmarks.measure import peak_memory

    *spatial, side, shift = SHAPES[what]
    window, heads = (side, side), 2

    def peak(limit: int | None) -> int:
        def build() -> Callable[[], None]:
            qkv = torch.randn(1, *spatial, 3 * 4 * heads).requires_grad_()
            table = torch.randn((2 * side - 1) ** 2, heads).requires_grad_()
            bias = BiasTable(table, token_places(window, window, CPU))

            def work() -> None:
                with use_attention(implementation):
                    window_attention(qkv, bias, window, (shift,) * 2, heads, max_logits=limit).sum().backward()
                qkv.grad = None

            return work

        return peak_memory(build, CPU)

    small, large = 2**14, 2**17
    assert peak(large) - peak(small) <= 6 * 4 * (large - small)
    assert peak(None) > 2 * peak(large)


@implementations
def test_dropout_drops_the_same_weights_in_backward(implementation: str) -> None:
    """The result is linear in the values: with queries and keys zero, it is their gradient's adjoint."""
    _, arguments = make("shifted")
    values = torch.cat([torch.zeros(2, 8, 12, 16), torch.randn(2, 8, 12, 8)], dim=-1).double().requires_grad_()
    with use_attention(implementation):
        out = window_attention(values, **arguments, dropout_p=0.5, max_logits=200)
    torch.manual_seed(5)  # other random numbers in between
    cotangent = torch.randn_like(out)
    gradient = torch.autograd.grad(out, values, cotangent)[0][..., 16:]
    torch.testing.assert_close((out * cotangent).sum(), (values[..., 16:] * gradient).sum(), rtol=1e-10, atol=1e-10)
    assert gradient.abs().sum() > 0


def test_global_attention_drops_weights_too() -> None:
    attention, x = SpatialReductionAttention(8, 2, sr_ratio=2, attn_drop_rate=0.5), torch.randn(1, 6, 6, 8)
    attention.max_logits = 40
    assert not torch.allclose(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("family", ["swinv2", "twins_svt"])
def test_with_checkpointing_autocast_and_gradients_of_gradients(family: str) -> None:
    model, given = tiny(family), images(family, 48, 40)
    leaves = list(model.parameters())

    def first(*, autocast: bool = False) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scalar = sum(x.float().square().mean() for x in model(given))
        return [scalar, *torch.autograd.grad(scalar, leaves)]

    def error(ours: list[Tensor], theirs: list[Tensor]) -> float:
        difference = sum(float((x - y).detach().square().sum()) for x, y in zip(ours, theirs, strict=True))
        return (difference / sum(float(y.detach().square().sum()) for y in theirs)) ** 0.5

    plain, narrow = first(), first(autocast=True)
    model.set_sequential_attention(500)
    for kind in ("block", "attention", False):
        model.set_grad_checkpointing(kind)
        assert error(first(), plain) < 1e-5
    assert error(first(autocast=True), plain) < 1.5 * error(narrow, plain)

    def second() -> Tensor:
        attention = model.stages[0].blocks[0].attn
        x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(attention(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    model.double()
    cut = second()
    model.set_sequential_attention(None)
    torch.testing.assert_close(cut, second(), rtol=1e-9, atol=1e-9)


def test_who_sets_it() -> None:
    for model in (tiny("pvt_v2"), tiny_classifier("swin"), hvt.create_simmim("swinv2_tiny_window16", depths=(1, 1))):
        model.set_sequential_attention(2**20)
        limits = [module.max_logits for module in model.modules() if hasattr(module, "max_logits")]
        assert limits
        assert set(limits) == {2**20}
        for wrong in (0, -1, 2.0, True, "all"):
            with pytest.raises(hvt.InputError, match=f"max_logits is {wrong!r}: give a positive whole number"):
                model.set_sequential_attention(wrong)
        model.set_sequential_attention(None)
        assert not any(getattr(module, "max_logits", None) for module in model.modules())


def test_nothing_is_cut_that_fits() -> None:
    """An attention with as many logits as the limit is computed as without one; one more, and it is cut."""
    called = []

    def attend(q: Tensor, *_: Tensor, **__: object) -> Tensor:
        called.append(tuple(q.shape))
        return q

    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4)
    for limit in (2 * 3 * 5 * 7, 2 * 3 * 5 * 7 - 1):
        assert torch.equal(sequential(attend, q, k, k, limit, scale=None, dropout_p=0.0), q)
    assert called == [(2, 3, 5, 4), (2, 2, 5, 4), (2, 1, 5, 4)]
