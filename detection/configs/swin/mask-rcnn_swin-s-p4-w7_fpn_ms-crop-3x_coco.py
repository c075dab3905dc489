# Swin-S as in its authors' code.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_small", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
