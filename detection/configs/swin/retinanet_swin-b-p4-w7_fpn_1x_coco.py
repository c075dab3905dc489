# The authors published no RetinaNet, and mmdetection's config has no result: the settings of Swin-B's Mask R-CNN.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_base", pretrained="in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[256, 512, 1024]),
)
