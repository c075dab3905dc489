"""Single training steps and one evaluation, against arithmetic done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from classification.command_line import parse_command_line
from classification.config import AugmentationConfig, ModelConfig, ParallelConfig, TrainConfig
from classification.data.loading import Batch
from classification.distributed import build_accelerator
from classification.objective import Classification
from classification.signals import StoppedError, StopRequest
from classification.state import Outcome, TrainStep, build_model
from classification.train import train
from classification.trainer import evaluate
from hvt_backbones import InputError


def pictures(count: int, classes: int = 7) -> list[Batch]:
    return [Batch(torch.randn(3, 4, 4), index % classes, index, index, []) for index in range(count)]


def collate(samples: Sequence[Batch]) -> Batch:
    images, targets, indices, seeds, _ = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), torch.tensor(seeds), [])


def loader(data: Sequence[Batch], batch_size: int) -> DataLoader:
    return DataLoader(data, batch_size, collate_fn=collate)


def linear(classes: int = 7) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, classes))


def on_cpu(amp: str = "fp32", accumulation: int = 1) -> Accelerator:
    return build_accelerator(TrainConfig(device="cpu", amp=amp, accumulation=accumulation), ParallelConfig())


def run_steps(
    model: nn.Module,
    data: Sequence[Batch],
    *,
    batch: int,
    accumulation: int = 1,
    lr: float = 0.1,
    augmentation: AugmentationConfig | None = None,
    **settings,
) -> list[Outcome]:
    """SGD over all the data, in its order."""
    accelerator = on_cpu(accumulation=accumulation)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=lr))
    step = TrainStep(wrapped, optimizer, accelerator, Classification(augmentation), **settings)
    every = list(loader(data, batch))
    return [step(every[start : start + accumulation]) for start in range(0, len(every), accumulation)]


def test_evaluation_counts_every_image_once() -> None:
    data, model = pictures(23), linear()
    result = evaluate(model, loader(data, 5), on_cpu())
    logits = model(torch.stack([picture.images for picture in data]))
    targets = torch.tensor([picture.targets for picture in data])
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert (result.images, result.correct) == (23, (ranks < 1).sum())
    assert result.top5 == pytest.approx(100 * (ranks < 5).sum().item() / 23)
    assert result.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert result.top1 == pytest.approx(100 * result.correct / 23)
    assert model.training


def test_top5_of_two_classes_is_all_of_them() -> None:
    result = evaluate(linear(2), loader(pictures(6, 2), 4), on_cpu())
    assert result.top5 == 100


def test_evaluation_uses_eval_mode() -> None:
    model, data = nn.Sequential(linear(), nn.Dropout(0.5)), pictures(9)
    once, twice = (evaluate(model, loader(data, 4), on_cpu()) for _ in range(2))
    assert once == twice


def test_evaluation_ends_when_asked_to() -> None:
    stop = StopRequest()
    stop.number = 15
    with pytest.raises(StoppedError, match="SIGTERM"):
        evaluate(linear(), loader(pictures(9), 4), on_cpu(), stop=stop)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    torch.manual_seed(0)
    data, model = pictures(12), linear().double()
    data = [picture._replace(images=picture.images.double()) for picture in data]
    large = copy.deepcopy(model)
    small_outcomes = run_steps(model, data, batch=2, accumulation=3)
    large_outcomes = run_steps(large, data, batch=6)
    for ours, theirs in zip(model.parameters(), large.parameters(), strict=True):
        # the loss is taken in float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for small, whole in zip(small_outcomes, large_outcomes, strict=True):
        assert (small.loss, small.grad_norm) == pytest.approx((whole.loss, whole.grad_norm), rel=1e-4)


def test_a_step_says_what_it_did() -> None:
    torch.manual_seed(0)
    data, model = pictures(4), linear()
    logits = model(torch.stack([picture.images for picture in data]))
    loss = F.cross_entropy(logits, torch.tensor([picture.targets for picture in data]), label_smoothing=0.1)
    norm = torch.stack([grad.square().sum() for grad in torch.autograd.grad(loss, model.parameters())]).sum().sqrt()
    (outcome,) = run_steps(model, data, batch=4, augmentation=AugmentationConfig(label_smoothing=0.1))
    assert (outcome.loss, outcome.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
    assert (outcome.applied, outcome.overflow, outcome.stop, outcome.local_loss_is_bad) == (True, False, False, False)


def test_gradients_are_clipped() -> None:
    model = linear()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    (outcome,) = run_steps(model, pictures(4), batch=4, lr=1.0, clip_grad=0.01)
    moved = torch.stack([(a - b).square().sum() for a, b in zip(model.parameters(), before, strict=True)]).sum().sqrt()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)
    assert outcome.grad_norm > 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing(bad: float) -> None:
    data, model = pictures(8), linear()
    data[5].images.fill_(bad)
    whole, skipped = copy.deepcopy(model), model
    good = run_steps(whole, data[:4] + data[6:], batch=2)
    outcomes = run_steps(skipped, data, batch=2)
    assert [outcome.applied for outcome in outcomes] == [True, True, False, True]
    assert outcomes[2].local_loss_is_bad
    assert math.isnan(outcomes[2].loss)
    assert [outcome.loss for outcome in outcomes if outcome.applied] == [outcome.loss for outcome in good]
    for ours, theirs in zip(skipped.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(48, 8), nn.Linear(8, 7)

        def forward(self, images: Tensor) -> Tensor:
            return self.last(InfiniteGradient.apply(self.first(images.flatten(1))))

    model = Bad()
    before = copy.deepcopy(model.state_dict())
    (outcome,) = run_steps(model, pictures(4), batch=4)
    assert math.isfinite(outcome.loss)
    assert not math.isfinite(outcome.grad_norm)
    assert (outcome.applied, outcome.overflow, outcome.local_loss_is_bad) == (False, False, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_loss_scale_that_overflows_is_halved_and_the_step_made_again() -> None:
    """As with fp16 on an accelerator: what is scaled here are gradients of float32."""
    data, model = pictures(4), linear()
    unscaled = copy.deepcopy(model)
    (plain,) = run_steps(unscaled, data, batch=4)
    accelerator = on_cpu()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    # what makes accelerate unscale before it clips; the model itself stays in float32
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast = nullcontext
    step = TrainStep(wrapped, optimizer, accelerator, Classification())
    (batch,) = loader([picture._replace(images=picture.images * 100) for picture in data], 4)
    (small,) = loader(data, 4)
    before = copy.deepcopy(model.state_dict())
    overflow = step([batch])
    assert (overflow.applied, overflow.overflow) == (False, True)
    assert accelerator.scaler.get_scale() == 2.0**7
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bad = step([batch._replace(images=batch.images * float("nan"))])
    assert (bad.applied, bad.overflow) == (False, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    accelerator.scaler.update(2.0**7)
    good = step([small])
    assert (good.applied, good.overflow) == (True, False)
    # powers of two scale exactly
    assert good.grad_norm == plain.grad_norm
    for ours, theirs in zip(model.parameters(), unscaled.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_needs_an_accelerator() -> None:
    with pytest.raises(InputError, match=r"train\.amp: fp16"):
        on_cpu("fp16")


def test_each_run_has_its_own_precision() -> None:
    assert [on_cpu(amp).mixed_precision for amp in ("bf16", "fp32", "auto")] == ["bf16", "no", "no"]


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(InputError, match="npu"):
        build_accelerator(TrainConfig(device="npu"), ParallelConfig())


@pytest.mark.slow
def test_compiled_blocks_train_as_plain_ones(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: tuple[str, ...]
) -> None:
    # the graphs are traced, forward and backward, but not turned into C++: that takes a minute for each block
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    arguments = [
        "digits",
        *quick,
        "--data-dir",
        str(small_data),
        "--epochs",
        "1",
        "--augmentation.auto_augment",
        "null",
    ]
    metrics = {}
    for choice in ("false", "true"):
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = str(tmp_path / choice)
        metrics[choice] = train(parse_command_line([*arguments, "--train.compile", choice, "--output-dir", folder]))
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2
    assert metrics["true"]["last"]["val_loss"] == pytest.approx(metrics["false"]["last"]["val_loss"], rel=1e-5)


def test_a_recipe_limits_the_logits_of_its_model() -> None:
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1)}
    model = build_model(ModelConfig(name="swinv2_tiny_window16", overrides=small, max_logits=2**20), 3, 5, None)
    assert [block.attn.max_logits for stage in model.backbone.stages for block in stage.blocks] == [2**20] * 2
