# Swin-S as in its authors' code.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_small", pretrained="in1k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
