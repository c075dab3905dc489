"""segmentation_models.pytorch, which takes any name of timm as `tu-NAME`."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

import hvt_backbones.timm  # noqa: F401 (registers the names)

from ..families import TINY
from ..test_timm import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_a_unet(name: str) -> None:
    tiny = {**TINY[NAMES[name]].keywords, "drop_path_rate": 0.1}
    torch.manual_seed(0)
    model = smp.Unet(
        f"tu-{name}", encoder_weights=None, in_channels=2, classes=3, decoder_channels=(16, 16, 8, 8, 8), **tiny
    )
    assert model.encoder.out_channels[2:] == model.encoder.model.feature_info.channels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels = torch.randn(2, 2, 64, 96), torch.randint(3, (2, 64, 96))
    loss_fn, losses = smp.losses.DiceLoss("multiclass"), []
    for _ in range(3):
        logits = model.train()(images)
        assert logits.shape == (2, 3, 64, 96)
        loss = loss_fn(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("architecture", ["FPN", "UPerNet", "Segformer"])
def test_other_decoders(architecture: str) -> None:
    model = smp.create_model(architecture, "tu-hvt_swin_tiny", encoder_weights=None, classes=2, **TINY["swin"].keywords)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
