"""Detectors and segmentors of the frameworks at tiny size, with a backbone of their own or with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmdet
import mmseg
import torch
from mmdet.structures import DetDataSample
from mmengine import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import hvt_backbones.openmmlab  # noqa: F401 (registers)

SWIN = {"depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
STAGES = {"num_heads": [1, 2, 4, 8], "sr_ratios": [8, 4, 2, 1], "mlp_ratios": [4, 4, 2, 2]}
# sr_ratios of 8 on maps of stride 4 need images of 32 pixels and more
WIDTHS = [8, 16, 32, 64]
TWINS = {"embed_dims": WIDTHS, "depths": [2, 2, 2, 2], **STAGES, "qkv_bias": True}

# name -> (the frameworks' backbone, ours)
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "swin": (
        {"type": "SwinTransformer", "embed_dims": 8, **SWIN},
        {"name": "swin_tiny", "embed_dim": 8, **SWIN},
    ),
    "pvt_v2": (
        {"type": "PyramidVisionTransformerV2", "embed_dims": 8, "num_layers": [2, 2, 2, 2], **STAGES},
        {"name": "pvt_v2_b2", "embed_dims": WIDTHS, "depths": [2, 2, 2, 2], **STAGES},
    ),
    "twins_pcpvt": ({"type": "PCPVT", **TWINS}, {"name": "twins_pcpvt_small", **TWINS}),
    "twins_svt": (
        {"type": "SVT", **TWINS, "windiow_sizes": [3, 3, 3, 3]},
        {"name": "twins_svt_small", **TWINS, "window_sizes": [3, 3, 3, 3]},
    ),
}
DETECTION = {"mask-rcnn": "mask-rcnn_r50_fpn", "cascade": "cascade-mask-rcnn_r50_fpn", "retinanet": "retinanet_r50_fpn"}
SEGMENTATION = {"upernet": "upernet_swin", "fpn": "fpn_r50"}


def backbone_config(family: str, *, ours: bool, **arguments: Any) -> dict[str, Any]:
    theirs, own = BACKBONES[family]
    return {"type": "HVTBackbone", **own, **arguments} if ours else {**theirs, **arguments}


def build(method: str, family: str, *, ours: bool, **arguments: Any) -> nn.Module:
    """A detector or segmentor, in eval mode, with starting values of its framework."""
    init_default_scope("mmdet" if method in DETECTION else "mmseg")
    config = _detector(method) if method in DETECTION else _segmentor(method)
    config.backbone = backbone_config(family, ours=ours, **arguments)
    model = MODELS.build(config)
    model.eval()
    return model


def _base(framework: Any, name: str) -> Config:
    return Config.fromfile(Path(framework.__file__).parent / ".mim/configs/_base_/models" / f"{name}.py").model


def _detector(method: str) -> Config:
    model = _base(mmdet, DETECTION[method])
    model.neck.update(in_channels=WIDTHS, out_channels=16)
    if method == "retinanet":
        model.bbox_head.update(num_classes=3, in_channels=16, feat_channels=16)
        return model
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.out_channels = 16
    model.roi_head.mask_roi_extractor.out_channels = 16
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(num_classes=3, in_channels=16, fc_out_channels=16)
    model.roi_head.mask_head.update(num_classes=3, in_channels=16, conv_out_channels=16)
    return model


def _segmentor(method: str) -> Config:
    model = _base(mmseg, SEGMENTATION[method])
    model.pretrained = None
    if method == "fpn":
        model.neck.update(in_channels=WIDTHS, out_channels=16)
        model.decode_head.update(in_channels=[16] * 4, channels=16)
    else:
        model.decode_head.update(in_channels=WIDTHS, channels=16)
        model.auxiliary_head.update(in_channels=WIDTHS[2], channels=16)
    # SyncBN runs in a group of processes only
    for head in (model.decode_head, model.get("auxiliary_head", {})):
        head.update(norm_cfg={"type": "BN"}, num_classes=5) if head else None
    return model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator) * 0.1
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif tensor.dim() == 1 and name.endswith("weight"):
            values = values + 1
        tensor.copy_(values)
    return model


def predict(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the framework says about images: boxes, scores, labels and masks, or the maps of logits."""
    size = tuple(images.shape[-2:])
    info = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size, "scale_factor": (1, 1)}
    segmentor = hasattr(model, "decode_head")
    samples = [(SegDataSample if segmentor else DetDataSample)(metainfo=info) for _ in images]
    with torch.no_grad():
        results = model(images, samples, mode="predict")
    if segmentor:
        return [result.seg_logits.data for result in results]
    found = [result.pred_instances for result in results]
    return [each[key] for each in found for key in ("bboxes", "scores", "labels", "masks") if key in each]


def assert_same_predictions(one: nn.Module, other: nn.Module, images: Tensor) -> None:
    for result, expected in zip(predict(one, images), predict(other, images), strict=True):
        assert len(expected)
        if expected.dtype == torch.bool:
            assert (result != expected).float().mean() < 1e-5  # pixels at the threshold, by rounding
        else:
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def dense_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps before anything is picked from them: mmcv's non-maximum suppression takes float32 alone."""
    with torch.no_grad():
        if hasattr(model, "decode_head"):
            return [model(images, mode="tensor")]
        maps = model.extract_feat(images)
        head = model.rpn_head if hasattr(model, "rpn_head") else model.bbox_head
        return [*maps, *(tensor for level in head(maps) for tensor in level)]
