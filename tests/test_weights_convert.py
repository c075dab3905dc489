"""The layout tables against the code bases themselves: strict loading and equal outputs, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from hvt_backbones import (
    Backbone,
    Classifier,
    InputError,
    PyramidVisionTransformerV2,
    SwinTransformer,
    SwinTransformerV2,
    TwinsPCPVT,
    TwinsSVT,
    VideoSwinTransformer,
    WeightsError,
    convert_state_dict,
    load_weights,
)
from hvt_backbones.weights import LAYOUTS
from hvt_backbones.weights.convert import read_checkpoint
from hvt_backbones.weights.keymap import Template, template
from hvt_backbones.weights.layouts import ALL, find_layout

SIZE = 64
CLASSES = 5
SWIN = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
DIMS = {"embed_dims": (8, 16, 24), "num_heads": (1, 2, 3), "mlp_ratios": (2, 2, 3), "sr_ratios": (4, 2, 1)}
PVT = {**DIMS, "depths": (1, 2, 1)}
TWINS = {**DIMS, "depths": (2, 3, 1)}


def swin(**more) -> Backbone:
    return SwinTransformer(**{**SWIN, "small_map": "shrink", "out_indices": (1,), **more})


def swinv2(**more) -> Backbone:
    return SwinTransformerV2(**{**SWIN, "small_map": "shrink", "out_indices": (1,), **more})


def pvt_v2(**more) -> Backbone:
    return PyramidVisionTransformerV2(**{**PVT, "out_indices": (2,), **more})


def twins_pcpvt(**more) -> Backbone:
    return TwinsPCPVT(**{**TWINS, "norm_after_stage": (False, False, True), "out_indices": (2,), **more})


def twins_svt(**more) -> Backbone:
    norms = (False, False, True)
    return TwinsSVT(**{**TWINS, "window_sizes": (4, 4, 4), "norm_after_stage": norms, "out_indices": (2,), **more})


def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer as Peer

    return Peer(img_size=SIZE, num_classes=CLASSES, **SWIN)


def timm_swinv2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Peer

    return Peer(img_size=SIZE, num_classes=CLASSES, **SWIN)


def timm_pvt_v2(**more) -> nn.Module:
    from timm.models.pvt_v2 import PyramidVisionTransformerV2 as Peer

    return Peer(num_classes=CLASSES, **PVT, **more)


def timm_twins(**more) -> nn.Module:
    from timm.models.twins import Twins as Peer

    return Peer(img_size=SIZE, num_classes=CLASSES, **TWINS, **more)


def torchvision_swin(**more) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer as Peer

    dims = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": [4, 4]}
    return Peer(**dims, num_classes=CLASSES, **more)


def torchvision_swinv2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    return torchvision_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def hf_config(name: str, **more):
    import transformers

    if name == "PvtV2":
        stages = {"hidden_sizes": [8, 16, 24], "depths": [1, 2, 1], "num_attention_heads": [1, 2, 3]}
        stages |= {"mlp_ratios": [2, 2, 3], "sr_ratios": [4, 2, 1], "num_encoder_blocks": 3}
        stages |= {"patch_sizes": [7, 3, 3], "strides": [4, 2, 2], "drop_path_rate": 0.0}
    else:
        stages = {"image_size": SIZE, "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
    return getattr(transformers, f"{name}Config")(**{**stages, "num_labels": CLASSES, **more})


def hf_classifier(name: str, **more) -> nn.Module:
    import transformers

    return getattr(transformers, f"{name}ForImageClassification")(hf_config(name, **more))


@dataclass(frozen=True)
class Peer:
    layout: str
    peer: Callable[[], nn.Module]
    ours: Callable[[], Backbone]
    recognised: str | None = None


PEERS = {
    "timm-swin": Peer("timm", timm_swin, swin),
    "timm-swinv2": Peer("timm", timm_swinv2, swinv2),
    "timm-pvt_v2": Peer("timm", timm_pvt_v2, pvt_v2),
    "timm-pvt_v2-linear": Peer("timm", lambda: timm_pvt_v2(linear=True), lambda: pvt_v2(linear=True)),
    "timm-twins_pcpvt": Peer("timm", timm_twins, twins_pcpvt, "official"),
    "timm-twins_svt": Peer("timm", lambda: timm_twins(wss=(4, 4, 4)), twins_svt, "official"),
    "torchvision-swin": Peer("torchvision", torchvision_swin, swin),
    "torchvision-swinv2": Peer("torchvision", torchvision_swinv2, swinv2),
    "huggingface-swin": Peer("huggingface", lambda: hf_classifier("Swin"), swin),
    "huggingface-swin-ape": Peer(
        "huggingface", lambda: hf_classifier("Swin", use_absolute_embeddings=True), lambda: swin(ape_size=16)
    ),
    "huggingface-swinv2": Peer("huggingface", lambda: hf_classifier("Swinv2"), swinv2),
    "huggingface-pvt_v2": Peer("huggingface", lambda: hf_classifier("PvtV2"), pvt_v2),
    "huggingface-pvt_v2-linear": Peer(
        "huggingface", lambda: hf_classifier("PvtV2", linear_attention=True), lambda: pvt_v2(linear=True)
    ),
}


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(images)
    return output if isinstance(output, Tensor) else output.logits


def assert_same_output(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 1e-2, "the outputs are too small to compare"
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-4


def assert_equal_dicts(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("case", PEERS.values(), ids=PEERS.keys())
def test_peer_and_back(case: Peer) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    peer = randomised(case.peer())
    model = Classifier(case.ours(), CLASSES).eval()
    report = load_weights(model, peer.state_dict())
    assert report.ok
    assert not report.dropped
    assert not report.initialised
    assert report.layout == (case.recognised or case.layout)
    assert_same_output(logits(model, images), logits(peer, images))

    model = randomised(model)
    window = 4 if model.backbone.family == "swinv2" else None
    theirs = convert_state_dict(model.state_dict(), to=case.layout, window_size=window)
    peer.load_state_dict(theirs, strict=True)
    assert_same_output(logits(model, images), logits(peer, images))
    assert_equal_dicts(convert_state_dict(theirs, to="hvt"), dict(model.state_dict()))


def test_torchvision_ignores_the_bias_of_keys() -> None:
    peer = randomised(torchvision_swinv2())
    images = torch.randn(1, 3, SIZE, SIZE)
    expected = logits(peer, images)
    bias = peer.features[1][0].attn.qkv.bias
    assert bias[8:16].abs().min() > 0
    model = Classifier(swinv2(), CLASSES).eval()
    load_weights(model, peer.state_dict())
    assert_same_output(logits(model, images), expected)
    written = convert_state_dict(model.state_dict(), to="torchvision", window_size=4)
    assert written["features.1.0.attn.qkv.bias"][8:16].abs().max() == 0


def hf_upernet(config) -> nn.Module:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    heads = {"hidden_size": 8, "auxiliary_channels": 8, "auxiliary_in_channels": 8}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **heads))


def hf_maskformer(config) -> nn.Module:
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation

    decoder = DetrConfig(d_model=32, decoder_layers=1, decoder_attention_heads=1, decoder_ffn_dim=8)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return MaskFormerForInstanceSegmentation(MaskFormerConfig(backbone_config=config, decoder_config=decoder, **sizes))


SMALL_DECODER = {
    **dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_attention_heads", "num_queries"), 2),
    **dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 8),
}


def hf_mask2former(config) -> nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, **SMALL_DECODER))


def hf_oneformer(config) -> nn.Module:
    from transformers import OneFormerConfig, OneFormerForUniversalSegmentation

    sizes = {"conv_dim": 32, "mask_dim": 32, "text_encoder_width": 8, "text_encoder_num_layers": 1}
    return OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=config, **sizes, **SMALL_DECODER))


def hf_detr(config) -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return DetrForObjectDetection(DetrConfig(backbone_config=config, use_timm_backbone=False, **sizes))


HF_MODELS = [None, hf_upernet, hf_maskformer, hf_mask2former, hf_oneformer, hf_detr]


@pytest.mark.parametrize("model", HF_MODELS, ids=lambda model: model and model.__name__)
@pytest.mark.parametrize("name", ["Swin", "Swinv2", "PvtV2"])
def test_transformers_dense_models(name: str, model: Callable[..., nn.Module] | None, tmp_path) -> None:
    """Modules and files have other names for the backbone, and MaskFormer has another backbone."""
    import transformers

    four = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "out_indices": (0, 1, 2, 3)}  # as MaskFormer demands
    more = {} if name == "PvtV2" else {"depths": [1] * 4, "num_heads": [1, 2, 2, 4]}
    config = hf_config(name, out_features=[f"stage{i + 1}" for i in range(4 if more else 3)], **more)
    peer = randomised(getattr(transformers, f"{name}Backbone")(config) if model is None else model(config))
    backbone = next(part for part in peer.modules() if type(part).__name__.endswith(f"{name}Backbone"))
    peer.save_pretrained(tmp_path)
    images = torch.randn(1, 3, SIZE, SIZE)
    ours = {
        "Swin": lambda: swin(**four, small_map="pad"),
        "Swinv2": lambda: swinv2(**four, output_norm=False),
        "PvtV2": lambda: pvt_v2(out_indices=(0, 1, 2)),
    }[name]
    for source in (peer.state_dict(), tmp_path / "model.safetensors"):
        report = load_weights(loaded := ours().eval(), source)
        assert report.ok
        assert not report.initialised
        with torch.no_grad():
            for ours_map, theirs in zip(loaded(images), backbone(images).feature_maps, strict=True):
                assert_same_output(ours_map, theirs)


@pytest.mark.parametrize("side", [24, 32], ids=["smaller than the window", "the window"])
def test_small_maps_of_transformers(side: int, caplog) -> None:
    """`Swinv2Backbone` shrinks the window where the last map is not larger, and `SwinBackbone` pads the map."""
    import transformers

    images = torch.randn(1, 3, side, side)
    built = {"Swin": swin, "Swinv2": lambda **more: swinv2(output_norm=False, **more)}
    for name, same in (("Swin", "pad"), ("Swinv2", "shrink")):
        config = hf_config(name, image_size=side, out_features=["stage1", "stage2"])
        peer = randomised(getattr(transformers, f"{name}Backbone")(config))
        for small_map in ("pad", "shrink"):
            caplog.clear()
            model = built[name](out_indices=(0, 1), small_map=small_map).eval()
            assert load_weights(model, peer.state_dict()).ok
            assert ('small_map="shrink"' in caplog.text) == ((name, small_map) == ("Swinv2", "pad"))
            with torch.no_grad():
                ours, theirs = model(images), peer(images).feature_maps
            assert_same_output(ours[0], theirs[0])
            difference = (ours[1] - theirs[1]).abs().max() / theirs[1].abs().max()
            assert difference < 1e-5 if small_map == same else difference > 1e-3
    of_classifier = hf_classifier("Swinv2").state_dict()
    load_weights(swinv2(out_indices=(0, 1), small_map="pad"), of_classifier)
    assert not caplog.text


@pytest.mark.parametrize("name", ["Swin", "PvtV2"])
def test_transformers_backbones(name: str) -> None:
    import transformers

    stages = 2 if name == "Swin" else 3
    config = hf_config(name, out_features=[f"stage{i + 1}" for i in range(stages)])
    peer = randomised(getattr(transformers, f"{name}Backbone")(config))
    model = {"Swin": swin, "PvtV2": pvt_v2}[name](out_indices=range(stages)).eval()
    assert load_weights(model, peer.state_dict()).ok
    theirs = convert_state_dict(model.state_dict(), to="huggingface")
    missing, unexpected = peer.load_state_dict(theirs, strict=False)
    # the last norm of SwinModel, which SwinBackbone has and does not use
    assert not unexpected
    assert all(key.startswith("swin.layernorm.") for key in missing)
    assert_equal_dicts(convert_state_dict(theirs, to="hvt"), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["Swin", "Swinv2", "PvtV2"])
def test_transformers_files(name: str, tmp_path) -> None:
    """Files keep older names than the modules; what we write is understood by `from_pretrained`."""
    from safetensors.torch import load_file, save_file

    peer = randomised(hf_classifier(name))
    peer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    model = Classifier({"Swin": swin, "Swinv2": swinv2, "PvtV2": pvt_v2}[name](), CLASSES).eval()
    report = load_weights(model, load_file(file))
    assert report.ok
    assert report.layout == "huggingface"
    images = torch.randn(1, 3, SIZE, SIZE)
    assert_same_output(logits(model, images), logits(peer, images))
    save_file(convert_state_dict(model.state_dict(), to="huggingface"), file, metadata={"format": "pt"})
    again = type(peer).from_pretrained(tmp_path).eval()
    assert_same_output(logits(again, images), logits(peer, images))


def video_swin(**more) -> Backbone:
    return VideoSwinTransformer(**{**SWIN, "window_size": (2, 4, 4), "out_indices": (1,), **more})


FAMILIES = {
    "swin": swin,
    "swinv2": swinv2,
    "pvt_v2": pvt_v2,
    "twins_pcpvt": twins_pcpvt,
    "twins_svt": twins_svt,
    "video_swin": video_swin,
}
DENSE = {
    "swin": {"out_indices": (0, 1), "ape_size": 16},
    "swinv2": {"out_indices": (0, 1), "ape_size": 16},
    "pvt_v2": {"out_indices": (0, 1, 2)},
    "twins_pcpvt": {"out_indices": (0, 1, 2), "norm_after_stage": False},
    "twins_svt": {"out_indices": (0, 1, 2), "norm_after_stage": True},
    "video_swin": {"out_indices": (0, 1)},
}
# what a code base's model of the family cannot hold: absolute embeddings, output norms
LACKS = {
    ("timm", "swin"),
    ("timm", "swinv2"),
    ("timm", "twins_svt"),
    ("torchvision", "swin"),
    ("torchvision", "swinv2"),
    ("huggingface", "swinv2"),
    ("official", "video_swin"),
    ("torchvision", "video_swin"),
}
# of whose model the buffers do not tell the window
WINDOWS = {"swinv2": 4, "video_swin": (2, 4, 4)}
TABLES = sorted({(table.name, table.family) for table in ALL})


@pytest.mark.parametrize("dense", [False, True], ids=["classifier", "dense"])
@pytest.mark.parametrize(("layout", "family"), TABLES, ids=lambda value: value)
def test_there_and_back_is_the_identity(layout: str, family: str, dense: bool) -> None:
    model = FAMILIES[family](**DENSE[family]) if dense else Classifier(FAMILIES[family](), CLASSES)
    ours = dict(randomised(model).state_dict())
    window = WINDOWS.get(family)
    if dense and (layout, family) in LACKS:
        with pytest.raises(WeightsError, match="has no place for"):
            convert_state_dict(ours, to=layout, window_size=window)
        return
    theirs = convert_state_dict(ours, to=layout, window_size=window)
    assert len({tensor.untyped_storage().data_ptr() for tensor in theirs.values()}) == len(theirs)
    # what is no part of a model: of masked pre-training, which has its own word for the position network, and of thop
    inside = find_layout(layout, family).wrapper.get("dense" if dense else "classifier", "")
    odd = {key.replace("cpb_mlp", "rpe_mlp"): tensor for key, tensor in theirs.items()}
    odd |= {key.rpartition(".")[0] + ".total_ops": torch.zeros(1) for key in theirs}
    odd |= {inside + "mask_token": torch.zeros(1, 1, 8), inside + "total_params": torch.zeros(1)}
    for prefix in ("", "module.", "model.module."):
        wrapped = {prefix + key: tensor for key, tensor in odd.items()}
        assert_equal_dicts(convert_state_dict({"epoch": 3, "state_dict": wrapped}, to="hvt"), ours)
    assert_equal_dicts(convert_state_dict(theirs, to="hvt", layout=layout), ours)
    assert_equal_dicts(convert_state_dict(theirs, to=layout, window_size=window), theirs)


def test_between_two_code_bases() -> None:
    """Swin from torchvision to the layout of mmdetection: buffers are computed, merging channels reordered."""
    theirs = convert_state_dict(torchvision_swin().state_dict(), to="mmdet")
    index = theirs["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"]
    assert index.shape == (16, 16)
    assert index.dtype == torch.int64
    expected = timm_swin().layers[0].blocks[0].attn.relative_position_index
    torch.testing.assert_close(index, expected)


def test_merging_in_the_order_of_unfold() -> None:
    """An nn.Unfold of a map, norm and reduction as mmdetection does, equals our patch merging."""
    model = randomised(swin(out_indices=(0, 1)))
    theirs = convert_state_dict(model.state_dict(), to="mmseg")
    x = torch.randn(2, 6, 8, 8)  # (B, H, W, C)
    columns = nn.functional.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    columns = nn.functional.layer_norm(
        columns, (32,), theirs["stages.0.downsample.norm.weight"], theirs["stages.0.downsample.norm.bias"]
    )
    merged = nn.functional.linear(columns, theirs["stages.0.downsample.reduction.weight"])
    torch.testing.assert_close(model.stages[1].downsample(x).flatten(1, 2), merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "ours", "prefix"),
    [
        ("mmdet", pvt_v2, "layers.2.1.0.attn.attn."),
        ("mmseg", twins_pcpvt, "layers.2.0.attn.attn."),
    ],
)
def test_packed_attention_is_multi_head_attention(layout: str, ours: Callable[[], Backbone], prefix: str) -> None:
    """OpenMMLab's global attention is PyTorch's own, whose projections are one tensor."""
    model = randomised(ours())
    theirs = convert_state_dict(model.state_dict(), to=layout)
    peer = nn.MultiheadAttention(24, 3, batch_first=True)
    peer.load_state_dict({key.removeprefix(prefix): t for key, t in theirs.items() if key.startswith(prefix)})
    x = torch.randn(1, 4, 5, 24)
    tokens = x.flatten(1, 2)
    expected = peer(tokens, tokens, tokens, need_weights=False)[0]
    torch.testing.assert_close(model.stages[2].blocks[0].attn(x).flatten(1, 2), expected, atol=1e-5, rtol=1e-5)


def test_names_of_mmsegmentation() -> None:
    """Twins-SVT there: local blocks have their own projections, global ones those of PyTorch's attention."""
    theirs = convert_state_dict(twins_svt(**DENSE["twins_svt"]).state_dict(), to="mmseg")
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    expected = {
        "patch_embeds.1.projection.weight": (16, 8, 2, 2),
        "position_encodings.1.proj.weight": (16, 1, 3, 3),
        "layers.0.0.attn.qkv.weight": (24, 8),
        "layers.0.0.attn.proj.weight": (8, 8),
        "layers.0.1.attn.attn.in_proj_bias": (24,),
        "layers.0.1.attn.attn.out_proj.weight": (8, 8),
        "layers.0.1.attn.sr.weight": (8, 8, 4, 4),
        "layers.0.1.attn.norm.bias": (8,),
        "layers.1.2.ffn.layers.0.0.weight": (32, 16),
        "layers.1.2.ffn.layers.1.bias": (16,),
        "layers.1.2.norm2.bias": (16,),
        "norm_list.2.weight": (24,),
    }
    assert expected.items() <= shapes.items()
    assert not any("attn.q." in key or "layers.0.1.attn.proj" in key for key in theirs)


def test_coordinates_are_kept_or_need_the_window() -> None:
    model = randomised(swinv2(pretrained_window_size=3))
    assert not any("relative" in key for key in convert_state_dict(model.state_dict(), to="official"))
    official = convert_state_dict(model.state_dict(), to="official", window_size=4, pretrained_window_size=3)
    key = "layers.0.blocks.0.attn.relative_coords_table"
    assert official[key].shape == (1, 7, 7, 2)
    assert official[key].max() == pytest.approx(torch.log2(torch.tensor(8 * 3 / 2 + 1)).item() / 3)
    mmpretrain = convert_state_dict(official, to="mmpretrain")
    kept = mmpretrain["stages.0.blocks.0.attn.w_msa.relative_coords_table"]
    torch.testing.assert_close(kept, official[key])


def test_window_that_is_not_square() -> None:
    ours = swin(window_size=(2, 5)).state_dict()
    assert not any(key.endswith("index") for key in convert_state_dict(ours, to="official"))
    with pytest.raises(WeightsError, match="position table would have 49 rows, the weights have 27"):
        convert_state_dict(ours, to="official", window_size=4)
    official = convert_state_dict(ours, to="official", window_size=(2, 5))
    assert official["layers.0.blocks.0.attn.relative_position_index"].shape == (10, 10)


def test_absolute_embedding_that_is_not_square() -> None:
    ours = dict(Classifier(randomised(swin(ape_size=(16, 8))), CLASSES).state_dict())
    official = convert_state_dict(ours, to="official")
    assert official["absolute_pos_embed"].shape == (1, 128, 8)
    with pytest.raises(WeightsError, match="ape_size"):
        convert_state_dict(official, to="hvt")
    assert_equal_dicts(convert_state_dict(official, to="hvt", ape_size=(16, 8)), ours)


@pytest.mark.parametrize("size", [1.5, 0, -3, True, "16", (16,), (16, 8, 8), (16, 8.0), [[16, 8], [16, 8]]], ids=str)
def test_a_grid_of_the_wrong_kind(size: object) -> None:
    with pytest.raises(InputError, match="ape_size is"):
        convert_state_dict(swin(ape_size=(16, 8)).state_dict(), to="official", ape_size=size)


def test_detectors_and_their_other_parts() -> None:
    official = convert_state_dict(swin(out_indices=(0, 1)).state_dict(), to="official")
    detector = {f"backbone.{key}": tensor for key, tensor in official.items()}
    detector |= {key: torch.zeros(1) for key in ("neck.conv.weight", "roi_head.bbox_head.fc.weight")}
    checkpoint = read_checkpoint(detector)
    assert checkpoint.wrapper == "backbone."
    assert checkpoint.style == "dense"
    assert not checkpoint.unknown
    assert sorted(checkpoint.dropped) == ["neck.conv.weight", "roi_head.bbox_head.fc.weight"]


def test_a_head_outside_is_not_the_head_inside() -> None:
    inside = {f"backbone.{key}": tensor for key, tensor in official_swin().items()}
    checkpoint = read_checkpoint({**inside, "head.weight": torch.ones(7, 7)})
    assert checkpoint.tensors["head.weight"].shape == (CLASSES, 16)
    assert list(checkpoint.dropped) == ["head.weight"]


def test_further_norms_of_swinv2_have_the_name_of_mmpretrain() -> None:
    weights = Classifier(swinv2(extra_norm_every_n_blocks=2), CLASSES).state_dict()
    theirs = convert_state_dict(weights, to="mmpretrain", window_size=4)
    assert [key for key in theirs if "norm3" in key and key.endswith("weight")] == [
        f"backbone.stages.{stage}.blocks.1.norm3.weight" for stage in range(2)
    ]
    assert_equal_dicts(convert_state_dict(theirs, to="hvt"), dict(weights))


def test_mmpretrain_is_told_by_its_head() -> None:
    weights = convert_state_dict(Classifier(swin(), CLASSES).state_dict(), to="mmpretrain")
    assert {key for key in weights if not key.startswith("backbone.")} == {"head.fc.weight", "head.fc.bias"}
    assert read_checkpoint(weights).layout.name == "mmpretrain"
    del weights["head.fc.weight"], weights["head.fc.bias"]
    assert read_checkpoint(weights).layout.name == "mmdet"


@pytest.mark.parametrize("head", [False, True], ids=["mmseg", "mmcls"])
@pytest.mark.parametrize("family", ["swin", "twins_pcpvt", "twins_svt"])
def test_openmmlab_with_the_norm_of_the_official_classifier(family: str, head: bool) -> None:
    """The converters of mmsegmentation leave its name as it is, and the first Swin of mmclassification had it too."""
    source = Classifier(randomised(FAMILIES[family]()), CLASSES)
    theirs = convert_state_dict(source.state_dict(), to="mmseg")
    last = source.backbone.out_indices[0]
    names = {f"backbone.{word}{last}.": "backbone.norm." for word in ("norm", "norm_list.")}
    for numbered, plain in names.items():
        theirs = {key.replace(numbered, plain) if key.startswith(numbered) else key: t for key, t in theirs.items()}
    assert "backbone.norm.weight" in theirs
    theirs["backbone.stages.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    if not head:
        theirs = {key.removeprefix("backbone."): t for key, t in theirs.items() if not key.startswith("head.")}
    model = Classifier(FAMILIES[family](), CLASSES)
    assert load_weights(model, theirs).initialised == ([] if head else ["head.weight", "head.bias"])
    assert_equal_dicts(dict(model.backbone.state_dict()), dict(source.backbone.state_dict()))
    dense = FAMILIES[family](**{**DENSE[family], "ape_size": None} if family == "swin" else DENSE[family])
    report = load_weights(dense, theirs)
    assert {key.split(".")[1] for key in report.initialised} == (
        set() if family == "twins_pcpvt" else {str(stage) for stage in range(last)}
    )


def test_one_stage_is_recognised() -> None:
    one = swin(depths=(2,), num_heads=(1,), out_indices=(0,))
    for layout in ("official", "timm"):
        theirs = convert_state_dict(Classifier(one, CLASSES).state_dict(), to=layout)
        assert read_checkpoint(theirs).layout.name == layout


def test_twins_without_its_unused_parts() -> None:
    """A dense SVT of the official code holds a last norm and a head that its forward does not use."""
    official = convert_state_dict(twins_svt(**DENSE["twins_svt"]).state_dict(), to="official")
    unused = {"norm.weight": torch.ones(24), "norm.bias": torch.ones(24), "head.weight": torch.ones(CLASSES, 24)}
    checkpoint = read_checkpoint({**official, **unused})
    assert checkpoint.dropped == dict.fromkeys(unused, "not used by the dense model")


def test_the_source_is_not_changed() -> None:
    weights = dict(randomised(timm_swin()).state_dict())
    copies = {key: tensor.clone() for key, tensor in weights.items()}
    convert_state_dict(weights, to="mmdet")
    assert_equal_dicts(weights, copies)


def official_swin() -> dict[str, Tensor]:
    return convert_state_dict(Classifier(swin(), CLASSES).state_dict(), to="official")


def hf_swin_without_a_key() -> dict[str, Tensor]:
    weights = dict(hf_classifier("Swin").state_dict())
    del weights["swin.encoder.layers.0.blocks.0.attention.k_proj.weight"]
    return weights


def twice() -> dict[str, Tensor]:
    return {prefix + key: tensor for prefix in ("student.", "teacher.") for key, tensor in official_swin().items()}


BAD = {
    "empty": (lambda: {}, {"to": "hvt"}, "holds no tensors"),
    "sets of tensors": (
        lambda: {"params": official_swin(), "params_ema": official_swin()},
        {"to": "hvt"},
        "choose weights_key= among 'params', 'params_ema'",
    ),
    "other model": (lambda: {"conv1.weight": torch.ones(2)}, {"to": "hvt"}, "none of the layouts.*conv1.weight"),
    "named layout": (official_swin, {"to": "hvt", "layout": "huggingface"}, "not in the huggingface layout"),
    "unknown layout": (official_swin, {"to": "keras"}, "no layout 'keras': choose one of hvt, official"),
    "unknown source layout": (official_swin, {"to": "hvt", "layout": "keras"}, "no layout 'keras'"),
    "family": (lambda: timm_pvt_v2().state_dict(), {"to": "torchvision"}, "'torchvision' does not have the family pvt"),
    "key without a rule": (
        lambda: {**official_swin(), "layers.0.blocks.0.attn.gate": torch.ones(1)},
        {"to": "timm"},
        "no rule for layers.0.blocks.0.attn.gate in the official layout of swin",
    ),
    "companion": (hf_swin_without_a_key, {"to": "hvt"}, "attention.k_proj.weight, which belongs to it"),
    "two backbones": (twice, {"to": "hvt"}, "2 backbones, under 'student.', 'teacher.'"),
    "embedding of a wrong rank": (
        lambda: {**official_swin(), "absolute_pos_embed": torch.ones(3)},
        {"to": "hvt"},
        "absolute_pos_embed",
    ),
}


@pytest.mark.parametrize(("weights", "arguments", "message"), BAD.values(), ids=BAD.keys())
def test_errors(weights: Callable[[], dict[str, Tensor]], arguments: dict[str, str], message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        convert_state_dict(weights(), **arguments)
    assert "\n" not in str(caught.value)


def test_templates() -> None:
    place = Template("features.{2s+1}.{b}.norm{n}.{p}")
    assert place.match("features.3.0.norm2.bias") == {"s": 1, "b": 0, "n": 2, "p": "bias"}
    assert place.fill({"s": 1, "b": 0, "n": 2, "p": "bias"}) == "features.3.0.norm2.bias"
    for other in ("features.2.0.norm2.bias", "features.3.0.norm2.running_mean", "features.03.0.norm2.bias"):
        assert place.match(other) is None
    assert Template("layers.{s-1}.x").match("layers.0.x") == {"s": 1}
    assert Template("norm{s+1}.{p}").match("norm0.bias") is None


def test_every_rule_reads_and_writes_alike() -> None:
    """Each side of a rule has the same places, so that neither direction lacks a number."""
    for table in ALL:
        for rule in table.rules or ():
            sides = [
                {name for part in side if part.key for name, *_ in template(part.key).places} - {"last"}
                for side in (rule.theirs, rule.ours)
            ]
            assert sides[0] == sides[1], rule


def test_layout_names() -> None:
    assert {table.name for table in ALL} | {"mmseg"} == set(LAYOUTS)
    assert find_layout("mmseg", "swin") is find_layout("mmdet", "swin")
