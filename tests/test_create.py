"""Arguments of `create_backbone` and `create_classifier`, and the choice of a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvt_backbones import InputError, WeightsError, create_backbone, create_classifier
from hvt_backbones.device import DISTRIBUTED_BACKENDS, select_device

BAD_ARGUMENTS = {
    "unknown argument": ({"widnow_size": 7}, "did you mean window_size"),
    "depths": ({"depths": ()}, "depths must be"),
    "more stages than heads": ({"depths": (1, 1, 1, 1, 1)}, "give num_heads for 5 stages"),
    "a stage that is not there": ({"depths": (1, 1), "out_indices": (0, 3)}, "0 to 1"),
    "one stage number": ({"out_indices": 3}, "out_indices must be a tuple"),
    "tag": ({"pretrained": "in21k"}, "in1k, in22k_ft_in1k, in22k"),
    "no channels": ({"embed_dim": 0}, "embed_dim is 0"),
    "parts of channels": ({"embed_dim": 96.0}, "embed_dim is 96.0"),
    "negative channels": ({"in_chans": -1}, "in_chans is -1"),
    "channels as text": ({"in_chans": "3"}, "in_chans is '3'"),
    "ratio": ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0"),
    "negative rate": ({"drop_path_rate": -1.0}, "drop_path_rate is -1.0"),
    "rate above 1": ({"attn_drop_rate": 2.0}, "attn_drop_rate is 2.0"),
    "part of a window": ({"window_size": 7.0}, "window_size is 7.0"),
    "number for a tag": ({"pretrained": 3}, "pretrained is 3"),
}


OF_THE_WRONG_KIND = {
    "swin_tiny": {"embed_dim": True, "num_heads": 2, "window_size": "7", "mlp_ratio": "4", "qkv_bias": 1, "norm_eps": 0,
                  "qk_scale": "1", "patch_norm": None, "small_map": 3, "drop_rate": float("nan")},
    "pvt_v2_b0": {"embed_dims": 64, "num_heads": 2, "mlp_ratios": 4, "sr_ratios": (8, 4, 2, 1.0), "linear": 1},
    "twins_pcpvt_small": {"sr_ratios": 1, "depths": 2, "norm_after_stage": 1, "sr_norm_eps": "x", "pad_patches": 0},
    "twins_svt_small": {"window_sizes": 7, "mask_padding": 1, "num_heads": ("2", 4, 8, 16)},
    "video_swin_tiny": {"window_size": (8, 7), "patch_size": 4.0, "out_indices": "3", "attn_drop_rate": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, wrong in OF_THE_WRONG_KIND.items() for argument in wrong]
)
def test_arguments_of_the_wrong_kind_are_named(name: str, argument: str) -> None:
    with pytest.raises(InputError, match=argument):
        create_backbone(name, **{argument: OF_THE_WRONG_KIND[name][argument]})


@pytest.mark.parametrize("size", [(16, 16, 16), (16,), (0, 16), -3, 16.0, True, "16"], ids=str)
def test_grids_of_the_absolute_position_embedding(size: object) -> None:
    with pytest.raises(InputError, match="ape_size is"):
        create_backbone("swin_tiny", ape_size=size)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_of_create_backbone(case: str) -> None:
    arguments, words = BAD_ARGUMENTS[case]
    with pytest.raises(InputError, match=words):
        create_backbone("swin_tiny", **arguments)


def test_fewer_stages_than_the_model_has() -> None:
    backbone = create_backbone("swinv2_tiny_window16", depths=(1, 1), embed_dim=32, num_heads=(1, 2))
    assert backbone.channels == (32, 64)
    classifier = create_classifier("twins_svt_small", depths=(1, 1), num_classes=3)
    assert classifier(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(InputError, match="num_classes"):
        create_classifier("swin_tiny", num_classes="ten")


@pytest.mark.parametrize("name", ["swin_tiny", "video_swin_tiny"])
def test_a_path_without_a_file_is_not_taken_for_a_tag(name: str) -> None:
    with pytest.raises(WeightsError, match="in1k does not exist: check the path"):
        create_backbone(name, pretrained=Path("in1k"))


def test_devices() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type in DISTRIBUTED_BACKENDS
    for name in ("tpu", "cuda:one", "cuda:²"):
        with pytest.raises(InputError, match="auto, cpu, cuda, npu"):
            select_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_accelerators_are_named() -> None:
    with pytest.raises(InputError, match="torch sees no accelerator"):
        select_device("cuda:1")
    with pytest.raises(InputError, match="needs the torch_npu package"):
        select_device("npu")


def test_a_class_map_selects_rows_of_the_pretrained_head(tmp_path: Path) -> None:
    tiny = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    source = create_classifier("swin_tiny", num_classes=5, **tiny)
    torch.save(source.state_dict(), tmp_path / "five.pth")
    model = create_classifier("swin_tiny", num_classes=2, pretrained=tmp_path / "five.pth", class_map=(4, 1), **tiny)
    torch.testing.assert_close(model.head.weight, source.head.weight[[4, 1]], rtol=0, atol=0)
    with pytest.raises(InputError, match="give `pretrained` too"):
        create_classifier("swin_tiny", num_classes=2, class_map=(4, 1), **tiny)
