# Twins-PCPVT-S as in the code of Twins (its PVT setting).
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/pvt_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_pcpvt_small", pretrained="in1k", style="official", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=0.0002))
