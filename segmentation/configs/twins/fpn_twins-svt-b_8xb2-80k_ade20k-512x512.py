# Twins-SVT-B in the PVT setting, in which its paper reports it, with mmsegmentation's drop path.
_base_ = [
    "../_base_/models/fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/pvt_80k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_svt_base", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
