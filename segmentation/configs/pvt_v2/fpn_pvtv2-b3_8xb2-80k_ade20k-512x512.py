# PVTv2-B3 with the settings of its paper and the drop path of its code; see the schedule for its number of steps.
_base_ = [
    "../_base_/models/fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/pvt_80k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b3", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
