# PVTv2-B2 as in its authors' code, which has the optimiser of Swin.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b2", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
