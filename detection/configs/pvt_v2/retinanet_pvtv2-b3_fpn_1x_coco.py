# PVTv2-B3 as in the code of PVTv2.
_base_ = [
    "../_base_/models/retinanet_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/pvt_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b3", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[128, 320, 512]),
)
