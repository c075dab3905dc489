"""One epoch and one evaluation, against arithmetic done by hand."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classification.engine import DivergedError, build_accelerator, evaluate, train_epoch
from hvt_backbones import InputError


def pictures(count: int, classes: int = 7) -> list[tuple[Tensor, int]]:
    return [(torch.randn(3, 4, 4), index % classes) for index in range(count)]


def linear(classes: int = 7) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def run_epoch(model: nn.Module, data: list, optimizer: torch.optim.Optimizer, *, batch: int, accumulation: int, **kw):
    accelerator = build_accelerator("cpu", "no", accumulation)
    model, optimizer = accelerator.prepare(model, optimizer)
    updates: list[int] = []
    settings = {"epoch": 0, "epochs": 1, "label_smoothing": 0.0, "mixup": None, "clip_grad": None, "ema": None} | kw
    result = train_epoch(
        model, DataLoader(data, batch, drop_last=True), optimizer, SimpleNamespace(step_update=updates.append),
        accelerator, **settings,
    )  # fmt: skip
    return result, updates


def test_evaluation_counts_every_image_once() -> None:
    data, model = pictures(23), linear()
    result = evaluate(model, DataLoader(data, 5), build_accelerator("cpu", "no"))
    logits = model(torch.stack([image for image, _ in data]))
    targets = torch.tensor([target for _, target in data])
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert (result.images, result.correct1, result.correct5) == (23, (ranks < 1).sum(), (ranks < 5).sum())
    assert result.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert result.top1 == pytest.approx(100 * result.correct1 / 23)
    assert model.training


def test_top5_of_two_classes_is_all_of_them() -> None:
    result = evaluate(linear(2), DataLoader(pictures(6, 2), 4), build_accelerator("cpu", "no"))
    assert result.top5 == 100


def test_evaluation_uses_eval_mode() -> None:
    model, data = nn.Sequential(linear(), nn.Dropout(0.5)), pictures(9)
    once, twice = (evaluate(model, DataLoader(data, 4), build_accelerator("cpu", "no")) for _ in range(2))
    assert once == twice


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    torch.manual_seed(0)
    data, model = pictures(12), linear().double()
    data = [(image.double(), target) for image, target in data]
    large = copy.deepcopy(model)
    small_result, small_updates = run_epoch(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1), batch=2, accumulation=3
    )
    large_result, large_updates = run_epoch(
        large, data, torch.optim.SGD(large.parameters(), lr=0.1), batch=6, accumulation=1
    )
    assert small_updates == large_updates == [0, 1, 2]
    for ours, theirs in zip(model.parameters(), large.parameters(), strict=True):
        # the loss is taken in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert small_result["train_loss"] == pytest.approx(large_result["train_loss"], rel=1e-4)


def test_an_incomplete_group_of_batches_makes_no_step() -> None:
    model = linear()
    _, updates = run_epoch(model, pictures(11), torch.optim.SGD(model.parameters(), lr=0.1), batch=2, accumulation=2)
    assert updates == [0, 1, 2]


def test_gradients_are_clipped() -> None:
    model = linear()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run_epoch(model, pictures(4), optimizer, batch=4, accumulation=1, clip_grad=0.01)
    moved = torch.stack([(a - b).square().sum() for a, b in zip(model.parameters(), before, strict=True)]).sum().sqrt()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops(bad: float) -> None:
    data = pictures(8)
    data[5][0].fill_(bad)
    model = linear()
    with pytest.raises(DivergedError, match=r"the loss became nan in epoch 1, at or before batch 4\. Lower --lr"):
        run_epoch(model, data, torch.optim.SGD(model.parameters(), lr=0.1), batch=2, accumulation=1)


def test_half_precision_needs_an_accelerator() -> None:
    with pytest.raises(InputError, match=r"train\.amp: fp16"):
        build_accelerator("cpu", "fp16")


def test_each_run_has_its_own_precision() -> None:
    assert [build_accelerator("cpu", amp).mixed_precision for amp in ("bf16", "no")] == ["bf16", "no"]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="npu"):
        build_accelerator("npu", "no")
