# Swin-B pretrained on ImageNet-22K as in its authors' code.
_base_ = [
    "../_base_/models/upernet_640x640.py",
    "../_base_/datasets/ade20k_640x640.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swin_base", pretrained="in22k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
