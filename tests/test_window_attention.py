"""Window attention: every implementation equals an independent one, token by token, in values and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hvt_backbones import InputError
from hvt_backbones.ops import IMPLEMENTATIONS, use_attention, window_attention, windows
from hvt_backbones.ops.cpu import attention as cpu

# name: (spatial, window, shift, heads)
MAPS = {
    "divides": ((8, 8), (4, 4), (0, 0), 2),
    "shifted": ((8, 12), (4, 4), (2, 2), 2),
    "padded": ((9, 13), (4, 4), (2, 2), 2),
    "smaller_than_window": ((3, 5), (4, 6), (2, 3), 3),
    "one_token": ((1, 1), (3, 3), (1, 1), 1),
    "shift_one_axis": ((7, 8), (7, 4), (0, 2), 1),
    "clip": ((4, 5, 6), (2, 3, 4), (1, 0, 2), 2),
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "cosine": {"cosine": True},
    "masked_padding": {"mask_padding": True},
    "no_bias": {"bias": False},
    "no_pad_value": {"pad_value": False},
    "cosine_masked_no_bias": {"cosine": True, "mask_padding": True, "bias": False},
}


def make(name: str, cosine: bool = False, bias: bool = True, pad_value: bool = True, **options) -> tuple[Tensor, dict]:
    spatial, window, shift, heads = MAPS[name]
    tokens, channels = math.prod(window), 4 * heads

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    return random(2, *spatial, 3 * channels), {
        "bias": random(heads, tokens, tokens) if bias else None,
        "window_size": window,
        "shift_size": shift,
        "num_heads": heads,
        "logit_scale": (5 * torch.rand(heads, 1, 1, dtype=torch.float64)).requires_grad_() if cosine else None,
        "pad_value": random(3 * channels) if pad_value else None,
        **options,
    }


def by_hand(
    qkv: Tensor,
    bias: Tensor | None,
    window_size,
    shift_size,
    num_heads,
    *,
    scale=None,
    logit_scale=None,
    pad_value=None,
    mask_padding=False,
) -> Tensor:
    """Each query alone: find the tokens of its window by arithmetic on positions, attend, put the result back."""
    batch, *spatial, channels = qkv.shape
    dim = channels // 3 // num_heads
    padded = [-(-n // w) * w for n, w in zip(spatial, window_size, strict=True)]
    offsets = list(itertools.product(*(range(w) for w in window_size)))
    filling = torch.zeros(channels, dtype=qkv.dtype) if pad_value is None else pad_value

    def token(position: tuple[int, ...]) -> Tensor:
        if all(p < n for p, n in zip(position, spatial, strict=True)):
            return qkv[(slice(None), *position)]
        return filling.expand(batch, channels)

    def where(index: tuple[int, ...]) -> tuple[int, ...]:  # rolled index -> position on the padded map
        return tuple((i + s) % n for i, s, n in zip(index, shift_size, padded, strict=True))

    def wrapped(index: tuple[int, ...]) -> tuple[bool, ...]:  # came over the border with the roll
        return tuple(i + s >= n for i, s, n in zip(index, shift_size, padded, strict=True))

    rows = {}
    for corner in itertools.product(*(range(0, n, w) for n, w in zip(padded, window_size, strict=True))):
        indices = [tuple(c + o for c, o in zip(corner, offset, strict=True)) for offset in offsets]
        tokens = torch.stack([token(where(i)) for i in indices], 1)
        q, k, v = tokens.unflatten(-1, (3, num_heads, dim)).permute(2, 0, 3, 1, 4)
        for row, index in enumerate(indices):
            position = where(index)
            if any(p >= n for p, n in zip(position, spatial, strict=True)):
                continue
            if logit_scale is None:
                logits = (k @ q[:, :, row, :, None])[..., 0] * (dim**-0.5 if scale is None else scale)
            else:
                cosine = torch.nn.functional.cosine_similarity(q[:, :, row, None], k, dim=-1)
                logits = cosine * logit_scale.view(num_heads, 1)
            if bias is not None:
                logits = logits + bias[:, row]
            for column, other in enumerate(indices):
                extra = -100.0 * (wrapped(index) != wrapped(other))
                every_axis = all(n % side for n, side in zip(spatial, window_size, strict=True))
                if mask_padding and every_axis and any(p >= n for p, n in zip(where(other), spatial, strict=True)):
                    extra -= 1000.0
                logits = logits + extra * (torch.arange(len(indices)) == column)
            rows[position] = (logits.softmax(-1)[:, :, None] @ v)[:, :, 0].flatten(1)
    stacked = torch.stack([rows[p] for p in itertools.product(*(range(n) for n in spatial))], 1)
    return stacked.unflatten(1, tuple(spatial))


def run(attention, qkv: Tensor, options: dict) -> list[Tensor | None]:
    out = attention(qkv, **options)
    leaves = [qkv, *(v for v in options.values() if isinstance(v, Tensor))]
    torch.manual_seed(1)
    return [out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves, allow_unused=True)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MAPS)
def test_implementations_agree_with_attention_by_hand(name: str, options: dict, implementation: str) -> None:
    qkv, arguments = make(name, **options)
    expected = run(by_hand, qkv, arguments)
    with use_attention(implementation):
        found = run(window_attention, qkv, arguments)
    for ours, theirs in zip(found, expected, strict=True):
        zero = torch.zeros((), dtype=torch.float64)  # a gradient that is not there is zero
        torch.testing.assert_close(
            *torch.broadcast_tensors(zero if ours is None else ours, zero if theirs is None else theirs),
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize("logits", [1, 200, 2**19], ids=["one_window", "a_few", "all_at_once"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MAPS)
def test_windows_are_attended_in_parts_without_gradients(
    name: str, options: dict, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvt_backbones.ops.cpu.attention.CHUNK", logits)
    qkv, arguments = make(name, **options)
    given = qkv.detach().clone()
    with torch.no_grad():
        with use_attention("reference"):
            expected = window_attention(qkv, **arguments)
        with use_attention("bmm"):
            found = window_attention(given, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.is_contiguous(), "a linear layer would copy it"
    assert torch.equal(given, qkv), "the map of the caller was written to"


@pytest.mark.parametrize("kept", [0, 100], ids=["made_again", "kept"])
@pytest.mark.parametrize("logits", [1, 200, 2**19], ids=["one_window", "a_few", "all_at_once"])
@pytest.mark.parametrize("options", [{}, {"cosine": True}, {"mask_padding": True, "bias": False}], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_windows_are_attended_in_parts_with_gradients(
    name: str, options: dict, logits: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hvt_backbones.ops.cpu.attention.CHUNK", logits)
    monkeypatch.setattr("hvt_backbones.ops.cpu.attention.KEPT", kept)
    qkv, arguments = make(name, **options)
    with use_attention("reference"):
        expected = run(window_attention, qkv, arguments)
    with use_attention("bmm"):
        found = run(window_attention, qkv, arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", ["qkv", "bias", "logit_scale"])
def test_a_gradient_of_one_alone(given: str) -> None:
    qkv, arguments = make("padded", cosine=True)
    leaves = {"qkv": qkv, **{key: value for key, value in arguments.items() if isinstance(value, Tensor)}}
    for key, leaf in leaves.items():
        leaf.requires_grad_(key == given)
    found = []
    for name in ("reference", "bmm"):
        with use_attention(name):
            found.append(torch.autograd.grad(window_attention(qkv, **arguments).square().sum(), leaves[given])[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("implementation", ["bmm"])
@pytest.mark.parametrize("options", [{}, {"cosine": True}], ids=["dot", "cosine"])
def test_gradients_of_gradients(options: dict, implementation: str) -> None:
    qkv, arguments = make("shift_one_axis", **options)
    leaves = [qkv, *(value for value in arguments.values() if isinstance(value, Tensor))]

    def second(name: str) -> list[Tensor | None]:
        with use_attention(name):
            loss = window_attention(qkv, **arguments).pow(3).sum()
            first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            return list(
                torch.autograd.grad(sum(x.square().sum() for x in first if x is not None), leaves, allow_unused=True)
            )

    for ours, theirs in zip(second(implementation), second("reference"), strict=True):
        assert (ours is None) == (theirs is None)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kept", [0, 100], ids=["made_again", "kept"])
def test_dropout_drops_the_same_weights_in_backward(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is linear in the values: with queries and keys zero, it is their gradient's adjoint."""
    monkeypatch.setattr("hvt_backbones.ops.cpu.attention.KEPT", kept)
    monkeypatch.setattr("hvt_backbones.ops.cpu.attention.CHUNK", 200)
    _, arguments = make("shifted")
    values = torch.cat([torch.zeros(2, 8, 12, 16), torch.randn(2, 8, 12, 8)], dim=-1).double().requires_grad_()
    with use_attention("bmm"):
        out = window_attention(values, **arguments, dropout_p=0.5)
    cotangent = torch.randn_like(out)
    gradient = torch.autograd.grad(out, values, cotangent)[0][..., 16:]
    torch.testing.assert_close((out * cotangent).sum(), (values[..., 16:] * gradient).sum(), rtol=1e-10, atol=1e-10)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("spatial", [(3, 5), (8, 13), (15, 16), (16, 17), (21, 30)])
def test_masks_that_differ_make_up_all(spatial: tuple[int, int], shifted: bool, mask_padding: bool) -> None:
    if not (shifted or mask_padding):
        return
    for window in ((4, 5), (1, 7)):
        where = (spatial, window, tuple(side // 2 if shifted else 0 for side in window), mask_padding)
        kind = (torch.float32, torch.device("cpu"))
        smaller, places = windows.distinct_windows(*where)
        masks = windows.window_mask(smaller, *where[1:], *kind)
        everything = windows.window_mask(*where, *kind)
        assert torch.equal(masks[list(places)], everything)
        assert torch.equal(windows.every_mask(*where, *kind), everything)
        assert len(masks) <= 9
        runs = torch.zeros(len(places), dtype=torch.bool)
        for first, end, place in cpu.masked_runs(*where):
            assert not runs[first:end].any()
            runs[first:end] = True
            assert set(places[first:end]) == {place}
        assert torch.equal(runs, everything.flatten(1).any(1))


def test_no_weight_is_a_denormal_number() -> None:
    """Processors take them one by one, a hundred times as slowly; a mask of -100 would make them by the thousand."""
    window, shift, kind = (4, 4), (2, 2), (torch.float32, torch.device("cpu"))
    grid = windows.WindowGrid(torch.Size((1, 8, 8, 48)), window, shift, 1)
    plan = cpu.Plan(grid, False, 0.25, *kind, 0.0)
    q, k = torch.randn(2, 4, 16, 16)
    weights = plan.weights(q, k, None, plan.everything())
    plain = (0.25 * q @ k.mT + windows.window_mask((8, 8), window, shift, False, *kind)).softmax(-1)

    def denormal(x: Tensor) -> int:
        return int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum())

    assert denormal(plain) > 100
    assert denormal(weights) == 0
    torch.testing.assert_close(weights, plain, rtol=1e-6, atol=1e-34)


def test_a_large_bias_is_felt_through_the_mask() -> None:
    qkv, arguments = make("shifted")
    arguments["bias"] = (arguments["bias"] + 150 * torch.eye(16).roll(8, 0)).detach()
    found = []
    for name in ("reference", "bmm"):
        with use_attention(name):
            found.append(window_attention(qkv, **arguments))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_memory_of_training_on_video() -> None:
    """Weights are not kept: 512 numbers for each token and head, where queries, keys and values are 24."""
    from benchmarks.measure import peak_memory

    qkv, bias = torch.randn(1, 16, 16, 16, 3 * 2 * 8).requires_grad_(), torch.randn(2, 512, 512)

    def build():
        def work() -> None:
            with use_attention("bmm"):
                window_attention(qkv, bias, (8, 8, 8), (4, 4, 4), 2).sum().backward()
            qkv.grad = None

        return work

    kept = 4 * 16**3 * 2 * 512  # bytes of all weights
    # windows and result, with their gradients; logits, weights and their gradients of one window and head; masks
    assert peak_memory(build, torch.device("cpu")) < kept / 2 + 8 * 4 * 512**2


def test_memory_of_a_large_map_without_gradients() -> None:
    """At most the windows, the result and one part of the logits at a time, neither a padded map nor all logits."""
    from benchmarks.measure import peak_memory

    qkv, bias = torch.randn(1, 80, 121, 3 * 24), torch.randn(3, 49, 49)
    mib = 4 * qkv.numel() / 2**20

    def build():
        def work() -> None:
            with torch.no_grad(), use_attention("bmm"):
                window_attention(qkv, bias, (7, 7), (3, 3), 3)

        return work

    # windows with their padding and the result: 1.1 + 0.33 maps; logits of 2 MiB and their softmax; masks
    assert peak_memory(build, torch.device("cpu")) / 2**20 < 1.5 * mib + 2 * 2 + 2.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softmax_is_wide_for_narrow_inputs(implementation: str) -> None:
    """With logits far beyond float16's range of exp, the result is finite and near that of float64."""
    qkv, options = make("shifted")
    qkv = (qkv.detach() * 30).to(torch.bfloat16)
    options |= {"bias": options["bias"].detach().float(), "pad_value": None}
    with use_attention("reference"):
        exact = window_attention(qkv.double(), **{**options, "bias": options["bias"].double()})
    with use_attention(implementation):
        found = window_attention(qkv, **options)
    assert found.dtype == torch.bfloat16
    # the logits' own rounding decides between near-equal keys; the bulk must agree
    assert (found.double() - exact).abs().median() < 0.1 * exact.abs().median()
    assert found.isfinite().all()


def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    qkv, options = make("divides")
    qkv = torch.ones_like(qkv)
    for implementation in IMPLEMENTATIONS:
        with use_attention(implementation):
            dropped = window_attention(qkv, **options, dropout_p=0.5)
        assert dropped.std() > 0.05
        assert abs(dropped.mean() - 1) < 0.2


def test_the_environment_and_the_context_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, options = make("divides")
    called = []
    for name in IMPLEMENTATIONS:
        attend = IMPLEMENTATIONS[name]._replace(attend=lambda *a, name=name, **k: called.append(name))
        monkeypatch.setitem(IMPLEMENTATIONS, name, attend)
    window_attention(qkv, **options)
    monkeypatch.setenv("HVT_ATTENTION", "reference")
    window_attention(qkv, **options)
    with use_attention("sdpa"):
        window_attention(qkv, **options)
    window_attention(qkv, **options)
    assert called == ["bmm", "reference", "sdpa", "reference"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": (4,)}, "2 axes"),
        ({"num_heads": 5}, "5 heads"),
        ({"shift_size": (4, 0)}, "less than window_size"),
        ({"shift_size": (-1, 0)}, "at least 0"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    qkv, options = make("divides")
    with pytest.raises(InputError, match=message):
        window_attention(qkv, **{**options, **change})


def test_what_is_asked_for_and_cannot_is_told_why() -> None:
    qkv, options = make("divides")
    meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in options.items()}
    assert window_attention(qkv.to("meta"), **meta).shape == (2, 8, 8, 8)
    with use_attention("bmm"):
        with pytest.raises(
            InputError, match="'bmm' is asked for, but it is for the CPU, and the map is on meta: choose"
        ):
            window_attention(qkv.to("meta"), **meta)
        with pytest.raises(InputError, match="cannot look into it"):
            torch.func.grad(lambda x: window_attention(x, **options).sum())(qkv.detach())


def test_bad_names(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, options = make("divides")
    with pytest.raises(InputError, match="'fast'.*reference"), use_attention("fast"):
        pass
    monkeypatch.setenv("HVT_ATTENTION", "faster")
    with pytest.raises(InputError, match="HVT_ATTENTION is 'faster'"):
        window_attention(qkv, **options)


def test_masks_are_made_where_the_map_is_and_kept() -> None:
    from hvt_backbones.ops.windows import window_mask

    arguments = ((8, 8), (4, 4), (2, 2), False, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        mask = window_mask(*arguments)
    assert mask is window_mask(*arguments)
    assert not mask.is_inference(), "a mask made during inference must serve a training step later"
    meta = torch.empty(1, 8, 8, 24, device="meta")
    assert window_attention(meta, None, (4, 4), (2, 2), 2).device.type == "meta"
