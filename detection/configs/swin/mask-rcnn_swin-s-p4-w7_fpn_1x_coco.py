# The authors' code has no Swin-S at one scale: the optimiser and drop path of its multi-scale training.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_small", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
