# The authors' code has no Swin-B at one scale: the optimiser and drop path of its multi-scale training.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_base", pretrained="in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
