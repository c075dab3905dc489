# Nobody published SwinV2-S on ADE20K: the settings of Swin-S.
_base_ = [
    "../_base_/models/fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/pvt_80k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swinv2_small_window8", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
