# Twins-SVT-S as mmsegmentation trains it; the authors speak of Swin's setting, and their code has no configs.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_svt_small", pretrained="in1k", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
