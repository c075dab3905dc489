# The authors' code has no PVTv2-B1 at 3x: the settings of its PVTv2-B2, which are those of Swin.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b1", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
