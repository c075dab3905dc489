# Twins-PCPVT-S in the PVT setting, in which its paper reports it, with mmsegmentation's drop path.
_base_ = [
    "../_base_/models/fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/pvt_80k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_pcpvt_small", pretrained="in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
