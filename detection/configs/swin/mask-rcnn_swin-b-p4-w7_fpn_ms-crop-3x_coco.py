# The authors' code has no Swin-B for Mask R-CNN: its optimiser, and the drop path of Swin-B in Cascade Mask R-CNN.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_base", pretrained="in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
