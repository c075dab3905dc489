"""Hierarchical vision-transformer backbones: Swin, SwinV2, PVTv2, Twins and Video Swin under one interface."""

try:
    import torch as _torch  # noqa: F401 (first, because it fails where a device backend that it loads does)
except RuntimeError as error:
    from .npu_doctor import explain_failed_import

    explain_failed_import(error)

from .backbone import Backbone
from .classifier import Classifier
from .create import create_backbone, create_classifier, create_simmim, list_models
from .errors import InputError, WeightsError
from .pvt_v2 import PyramidVisionTransformerV2
from .simmim import SimMIM
from .swin import SwinTransformer, SwinTransformerV2
from .twins import TwinsPCPVT, TwinsSVT
from .version import __version__
from .video_swin import VideoSwinTransformer
from .weights import LoadReport, convert_state_dict, inflate, load_weights

__all__ = [
    "Backbone",
    "Classifier",
    "InputError",
    "LoadReport",
    "PyramidVisionTransformerV2",
    "SimMIM",
    "SwinTransformer",
    "SwinTransformerV2",
    "TwinsPCPVT",
    "TwinsSVT",
    "VideoSwinTransformer",
    "WeightsError",
    "__version__",
    "convert_state_dict",
    "create_backbone",
    "create_classifier",
    "create_simmim",
    "inflate",
    "list_models",
    "load_weights",
]
