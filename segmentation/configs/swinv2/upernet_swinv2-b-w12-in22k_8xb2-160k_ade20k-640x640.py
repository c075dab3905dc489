# Nobody published SwinV2-B on ADE20K: the settings of Swin-B, and no weight decay on the scale and the position
# bias of its attention, as in its pretraining. The windows are those of the pretraining at 192 x 192.
_base_ = [
    "../_base_/models/upernet_640x640.py",
    "../_base_/datasets/ade20k_640x640.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swinv2_base_window12_192", pretrained="in22k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
