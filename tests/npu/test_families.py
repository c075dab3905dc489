"""Every family on the stand-in NPU: the CPU's numbers, and nothing left on the CPU."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvt_backbones.ops.dispatch import IMPLEMENTATIONS, choose, use_attention
from tests.families import TINY, images, tiny_classifier
from tests.npu.only_on import OnlyOn

ATTENTION = [None, "gather", "reference"]  # None: what the device gets by default
TARGETS = torch.tensor([1, 3])


def batch(family: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return images(family, 72, 64).to(dtype)  # 72: odd windows pad


def step(
    model: nn.Module, given: Tensor, device: str, *, watched: bool = False, autocast: bool = False
) -> list[Tensor]:
    """Logits and all gradients, as float64 on the CPU."""
    model.zero_grad()
    given, targets = given.to(device), TARGETS.to(device)
    with OnlyOn("npu") if watched else contextlib.nullcontext():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            logits = model(given)
            loss = F.cross_entropy(logits, targets)
        loss.backward()
    assert logits.dtype == (torch.bfloat16 if autocast else given.dtype)
    assert {parameter.grad.device.type for parameter in model.parameters()} == {device}
    return [tensor.detach().to("cpu", torch.float64) for tensor in (logits, *(p.grad for p in model.parameters()))]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Of all tensors as one vector."""
    difference = sum((a - e).square().sum() for a, e in zip(actual, expected, strict=True))
    return (difference / sum(e.square().sum() for e in expected)).sqrt().item()


def chosen(attention: str | None) -> contextlib.AbstractContextManager[None]:
    return use_attention(attention) if attention else contextlib.nullcontext()


def test_default_attention_is_not_the_cpus() -> None:
    assert choose(torch.empty(1)) == "bmm"
    assert choose(torch.empty(1, device="npu")) == "sdpa"
    assert {"sdpa", *ATTENTION[1:]} == set(IMPLEMENTATIONS) - {"bmm"}, "an implementation that is not tested here"


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", TINY)
def test_float32_training_step(family: str, attention: str | None) -> None:
    model, on_npu = tiny_classifier(family), tiny_classifier(family).to("npu")
    with chosen(attention):
        expected = step(model, batch(family), "cpu")
        actual = step(on_npu, batch(family), "npu")
        watched = step(on_npu, batch(family), "npu", watched=True)
    assert relative_error(actual[:1], expected[:1]) < 1e-5
    assert relative_error(actual[1:], expected[1:]) < 1e-5
    assert all(map(torch.equal, watched, actual))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", TINY)
def test_attention_part_by_part(family: str, attention: str | None) -> None:
    expected = step(tiny_classifier(family), batch(family), "cpu")
    model = tiny_classifier(family).to("npu")
    model.set_sequential_attention(2000)
    with chosen(attention):
        actual = step(model, batch(family), "npu", watched=True)
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("family", TINY)
def test_every_gradient(family: str) -> None:
    """In float64, where a wrong gradient of a small tensor does not hide behind rounding."""
    expected = step(tiny_classifier(family).double(), batch(family, torch.float64), "cpu")
    actual = step(tiny_classifier(family).double().to("npu"), batch(family, torch.float64), "npu")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9 * e.abs().max().item())


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", TINY)
def test_bfloat16_autocast(family: str, attention: str | None) -> None:
    expected = step(tiny_classifier(family), batch(family), "cpu")
    with chosen(attention):
        actual = step(tiny_classifier(family).to("npu"), batch(family), "npu", autocast=True, watched=True)
    assert 1e-4 < relative_error(actual, expected) < 0.03  # 2 ** -8 is 0.004; no difference: nothing was cast


@pytest.mark.parametrize("family", TINY)
def test_channels_last(family: str) -> None:
    expected = step(tiny_classifier(family), batch(family), "cpu")
    channels_last = torch.channels_last_3d if batch(family).dim() == 5 else torch.channels_last
    model = tiny_classifier(family).to("npu", memory_format=channels_last)
    actual = step(model, batch(family).contiguous(memory_format=channels_last), "npu", watched=True)
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("family", TINY)
def test_inference(family: str) -> None:
    model, given = tiny_classifier(family).eval(), batch(family)
    with torch.inference_mode():
        expected = model(given)
    model.to("npu")
    given = given.to("npu")
    with torch.inference_mode(), OnlyOn("npu"):
        first, again = model(given), model(given)  # the second reads position biases that the first kept
    assert first.device.type == "npu"
    torch.testing.assert_close(first.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, again)


@pytest.mark.parametrize("family", TINY)
def test_randomness_is_the_devices(family: str) -> None:
    model = tiny_classifier(family, drop_path_rate=0.5, drop_rate=0.5, attn_drop_rate=0.5).to("npu").train()
    model.set_sequential_attention(2000)
    given, host_state = batch(family).to("npu"), torch.get_rng_state()
    torch.npu.manual_seed(7)
    with OnlyOn("npu"):
        first, second = model(given), model(given)
    torch.npu.manual_seed(7)
    assert torch.equal(model(given), first)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), host_state)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_optimiser_steps(fused: bool) -> None:
    models = {"cpu": tiny_classifier("swinv2"), "npu": tiny_classifier("swinv2").to("npu")}
    for device, model in models.items():
        given, targets = batch("swinv2").to(device), TARGETS.to(device)
        optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.05), lr=1e-3, fused=fused)
        with OnlyOn(device):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(given), targets).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
    for on_npu, on_cpu in zip(models["npu"].parameters(), models["cpu"].parameters(), strict=True):
        # Adam's first steps divide gradients by their own size: those near zero lose digits
        torch.testing.assert_close(on_npu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
