# PVTv2-B2 as in the code of PVTv2.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/pvt_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b2", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=0.0002))
