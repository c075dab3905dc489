"""The lookup of published weights in the tables of timm and torchvision; nothing is downloaded."""

from __future__ import annotations

import pytest

from hvt_backbones.errors import WeightsError
from hvt_backbones.weights.published import timm_weights, torchvision_weights


def test_timm_table() -> None:
    weights = timm_weights("swin_base_patch4_window12_384.ms_in22k")
    assert weights.source == "hf-hub:timm/swin_base_patch4_window12_384.ms_in22k"
    assert (weights.num_classes, weights.license) == (21841, "mit")
    assert weights.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
    assert weights.preprocessing.input_size == (3, 384, 384)
    assert (weights.preprocessing.crop_pct, weights.preprocessing.interpolation) == (1.0, "bicubic")
    with pytest.raises(
        WeightsError,
        match=r"timm has no weights named 'swin_tiny_patch4_window7_224\.ms_in2k': did you mean .*ms_in22k",
    ):
        timm_weights("swin_tiny_patch4_window7_224.ms_in2k")
    with pytest.raises(WeightsError, match=r"timm has no weights named 'zzz': known: "):
        timm_weights("zzz")


def test_torchvision_table() -> None:
    weights = torchvision_weights("swin_v2_t")
    assert weights == torchvision_weights("Swin_V2_T_Weights.IMAGENET1K_V1")
    assert weights.source.endswith("/swin_v2_t-b137f0e2.pth")
    assert (weights.num_classes, weights.preprocessing.input_size) == (1000, (3, 256, 256))
    assert weights.preprocessing.interpolation == "bicubic"
    assert weights.preprocessing.crop_pct == pytest.approx(256 / 260)
    for unknown in ("swin_q", "Swin_T_Weights.NONE", "Swin_Q_Weights.DEFAULT"):
        with pytest.raises(WeightsError, match=rf"torchvision has no weights named '{unknown}'"):
            torchvision_weights(unknown)
