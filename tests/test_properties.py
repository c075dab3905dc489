"""What must hold for any shape, window and input, searched by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvt_backbones.ops import IMPLEMENTATIONS, use_attention

from .families import TINY, images, tiny, tiny_classifier

side = st.integers(min_value=32, max_value=90)
quick = settings(max_examples=12)


@pytest.mark.parametrize("family", TINY)
@given(height=side, width=side, batch=st.integers(1, 3))
@quick
def test_any_size_gives_finite_maps_of_the_same_shapes_for_each_sample(
    family: str, height: int, width: int, batch: int
) -> None:
    model = tiny(family).eval()
    x = images(family, height, width, batch=batch)
    with torch.inference_mode():
        maps, alone = model(x), model(x[-1:])
    for one, many, stride in zip(alone, maps, model.strides, strict=True):
        assert many.shape[0] == batch
        assert one.shape[1:] == many.shape[1:]
        assert all(
            max(n // stride, 1) <= m <= -(-n // stride) for n, m in zip((height, width), many.shape[-2:], strict=True)
        )
        torch.testing.assert_close(one, many[-1:], rtol=1e-3, atol=1e-4)
        assert many.isfinite().all()


@pytest.mark.parametrize("family", ["swin", "swinv2", "twins_svt"])
@given(
    height=side,
    width=side,
    windows=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=4, max_size=4),
    small_map=st.sampled_from(["pad", "shrink"]),
)
@quick
def test_any_window_fits_any_map(family: str, height: int, width: int, windows: list, small_map: str) -> None:
    name = "window_sizes" if family == "twins_svt" else "window_size"
    options = {} if family == "twins_svt" else {"small_map": small_map}
    model = tiny(family, **{name: tuple(windows)}, **options).eval()
    with torch.inference_mode():
        assert all(x.isfinite().all() for x in model(torch.randn(1, 3, height, width)))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_stays_finite_with_inputs_a_thousand_times_too_large(family: str, dtype: torch.dtype) -> None:
    model = tiny_classifier(family)
    x = 1000 * images(family, 64, 64)
    for implementation in IMPLEMENTATIONS:
        with torch.autocast("cpu", dtype), use_attention(implementation):
            loss = model(x).float().square().mean()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", ["swin", "swinv2", "video_swin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_softmax_and_position_bias_are_float32_under_autocast(family: str, dtype: torch.dtype) -> None:
    model = tiny_classifier(family).eval()
    biases, softmaxes = [], []
    for module in model.modules():
        if hasattr(module, "position_bias"):
            module.position_bias.register_forward_hook(lambda _m, _a, bias: biases.append(bias.dtype))

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.softmax, torch.softmax):
                softmaxes.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype), Watch():
        model(images(family, 64, 64, batch=1))
    assert set(biases) == {torch.float32}
    assert set(softmaxes) == {torch.float32}


@pytest.mark.parametrize("family", TINY)
def test_a_last_stage_of_one_token_gives_no_nan(family: str) -> None:
    model = tiny_classifier(family)
    loss = model(images(family, 32, 32)).square().sum()
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
