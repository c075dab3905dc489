# The authors published no RetinaNet, and mmdetection's config has no result: the settings of Swin-S's Mask R-CNN.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_small", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768]),
)
