# Nobody published PVTv2-B2-Li in UPerNet: the settings of Swin, with the drop path of PVTv2's Semantic FPN.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b2_li", pretrained="in1k", style="official", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
