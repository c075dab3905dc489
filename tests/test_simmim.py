"""SimMIM beside its reference cases: masks, targets, other sizes, weights in and out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import hvt_backbones as hvt
from hvt_backbones.simmim import normalise_target, random_mask

from .families import WINDOWED, randomise

SMALL = {**WINDOWED, "drop_path_rate": 0.0}
families = pytest.mark.parametrize("name", ["swin_tiny", "swinv2_tiny_window8"])


def simmim(name: str, **arguments) -> hvt.SimMIM:
    return randomise(hvt.create_simmim(name, **{**SMALL, **arguments})).eval()


def masked(*size: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    images = torch.randn(batch, 3, *size)
    return images, torch.stack([random_mask(*size) for _ in range(batch)])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_a_mask_hides_whole_squares_and_at_least_the_ratio(side: int, ratio: float) -> None:
    mask = random_mask(192, 256, ratio=ratio, mask_patch_size=side)
    assert (mask.dtype, mask.shape) == (torch.bool, (48, 64))
    squares = mask.unflatten(0, (-1, side // 4)).unflatten(2, (-1, side // 4)).transpose(1, 2).flatten(2)
    assert (squares.all(-1) | ~squares.any(-1)).all()
    count = squares[..., 0].numel()
    assert squares[..., 0].sum() == math.ceil(ratio * count)


def test_masks_follow_from_the_generator_and_hide_every_square_as_often() -> None:
    first, again, other = (random_mask(192, 192, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = torch.Generator().manual_seed(0)
    share = torch.stack([random_mask(64, 64, generator=generator) for _ in range(2000)]).double().mean(0)
    assert (share - 0.75).abs().max() < 0.05  # 3 of 4 squares


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0}, "mask ratio 0: give a number between 0 and 1"),
        ({"ratio": 1.0}, "mask ratio 1.0"),
        ({"ratio": float("nan")}, "mask ratio nan"),
        ({"mask_patch_size": 30}, "mask_patch_size 30: give a multiple of the patch size 4"),
        ({"mask_patch_size": 48}, "mask_patch_size 48 does not divide an image of 64x64"),
    ],
)
def test_masks_that_cannot_be(arguments: dict, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        random_mask(64, 64, **arguments)


def test_a_normalised_target_by_hand() -> None:
    image = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    found = normalise_target(image, 5)
    for channel, row, column in ((0, 0, 0), (1, 4, 5), (0, 8, 10), (1, 1, 9)):
        around = image[0, channel, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        expected = (image[0, channel, row, column] - around.mean()) / (around.var() + 1e-6).sqrt()
        torch.testing.assert_close(found[0, channel, row, column], expected)


@families
def test_what_is_hidden_is_not_seen(name: str) -> None:
    model = simmim(name)
    images, mask = masked(64, 96)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    with torch.no_grad():
        before, after = model(images, mask), model(torch.where(hidden, torch.randn_like(images), images), mask)
        assert before.shape == images.shape
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        seen = model(torch.where(hidden, images, images + 1), mask)
    assert (seen - before).abs().max() > 1e-3


@families
def test_only_hidden_pixels_count(name: str) -> None:
    model = simmim(name)
    images, mask = masked(64, 64)
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    painted = model(images, mask)
    loss = model.loss(images, painted, mask)
    torch.testing.assert_close(loss, (painted - images).abs()[hidden.expand_as(images)].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.loss(images, torch.where(hidden, painted, 7.0), mask), loss)
    (gradient,) = torch.autograd.grad(loss, painted)
    assert gradient[~hidden.expand_as(images)].abs().max() == 0


@families
@pytest.mark.parametrize("layout", ["official", "mmpretrain", "hvt"])
def test_weights_go_out_and_come_back(name: str, layout: str) -> None:
    model, other = simmim(name), hvt.create_simmim(name, **SMALL)
    theirs = hvt.convert_state_dict(model.state_dict(), to=layout, window_size=4)
    report = hvt.load_weights(other, theirs)
    assert report.ok
    assert not report.initialised
    assert not report.dropped
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    expected = {
        "official": ("encoder.mask_token", "decoder.0.weight"),
        "mmpretrain": ("backbone.mask_token", "neck.decoder.0.weight"),
        "hvt": ("mask_token", "decoder.weight"),
    }[layout]
    assert all(key in theirs for key in expected)


@families
def test_fine_tuning_starts_from_it_and_it_from_a_classifier(name: str) -> None:
    model = simmim(name)
    classifier = hvt.create_classifier(name, num_classes=5, **SMALL)
    report = hvt.load_weights(classifier, model.state_dict())
    assert report.dropped == ["mask_token", "decoder.weight", "decoder.bias"]
    assert report.initialised == ["head.weight", "head.bias"]
    assert torch.equal(classifier.backbone.stages[3].norm.weight, model.backbone.stages[3].norm.weight)

    report = hvt.load_weights(hvt.create_simmim(name, **SMALL), classifier.state_dict())
    assert report.initialised == ["mask_token", "decoder.weight", "decoder.bias"]
    assert report.dropped == ["head.weight", "head.bias"]


def test_a_mask_token_alone_does_not_make_it_one() -> None:
    classifier = hvt.create_classifier("swin_tiny", num_classes=5, **SMALL)
    weights = {**hvt.convert_state_dict(classifier.state_dict(), to="official"), "mask_token": torch.ones(1, 1, 8)}
    report = hvt.load_weights(hvt.create_classifier("swin_tiny", num_classes=5, **SMALL), weights)
    assert report.dropped == ["mask_token"]
    assert not report.initialised
    assert "head.fc.weight" in hvt.convert_state_dict(weights, to="timm")


@families
def test_parameter_groups(name: str) -> None:
    model = simmim(name)
    groups = model.param_groups(lr=1.0, layer_decay=0.5)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert found.keys() == {id(parameter) for parameter in model.parameters()}
    assert (found[id(model.mask_token)]["weight_decay"], found[id(model.mask_token)]["lr"]) == (0.0, 0.5**8)
    assert (found[id(model.decoder.weight)]["weight_decay"], found[id(model.decoder.weight)]["lr"]) == (0.05, 1.0)


def test_checkpointing_changes_no_number() -> None:
    plain, other = simmim("swin_tiny").train(), simmim("swin_tiny").train()
    other.set_grad_checkpointing()
    images, mask = masked(64, 64)
    losses = [model.loss(images, model(images, mask), mask) for model in (plain, other)]
    for loss in losses:
        loss.backward()
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


WRONG = {
    "a pyramid": (lambda: hvt.create_simmim("pvt_v2_b0"), "SimMIM is for Swin and SwinV2, and pvt_v2_b0 is of"),
    "a video model": (lambda: hvt.create_simmim("video_swin_tiny"), "of the family video_swin"),
    "another module": (lambda: hvt.SimMIM(nn.Linear(2, 2)), "takes a Swin or SwinV2 of images"),
    "several maps": (lambda: hvt.SimMIM(hvt.SwinTransformer(**SMALL)), "last stage is its only output"),
    "an even window": (lambda: simmim("swin_tiny", norm_target=4), "norm_target is 4: give an odd number"),
    "oblong patches": (lambda: simmim("swin_tiny", patch_size=(4, 2)), "SimMIM paints squares"),
    "a remainder": (lambda: simmim("swin_tiny")(torch.randn(1, 3, 72, 64), None), "72x64: SimMIM needs multiples"),
    "another mask": (
        lambda: simmim("swin_tiny")(torch.randn(1, 3, 64, 64), torch.ones(1, 8, 16)), r"expected \(1, 16, 16\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit(make, message: str) -> None:
    with pytest.raises(hvt.InputError, match=message):
        make()
