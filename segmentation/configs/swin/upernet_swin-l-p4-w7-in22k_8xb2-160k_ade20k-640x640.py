# Swin-L pretrained on ImageNet-22K as in its authors' code.
_base_ = [
    "../_base_/models/upernet_640x640.py",
    "../_base_/datasets/ade20k_640x640.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_large", pretrained="in22k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
