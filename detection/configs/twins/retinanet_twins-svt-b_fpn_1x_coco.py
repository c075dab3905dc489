# Twins-SVT-B as in the code of Twins (its PVT setting).
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/pvt_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_svt_base", pretrained="in1k", style="official", drop_path_rate=0.2),
    neck=dict(in_channels=[192, 384, 768]),
)
