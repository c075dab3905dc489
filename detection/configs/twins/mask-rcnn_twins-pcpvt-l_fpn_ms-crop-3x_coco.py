# The authors' code has no Twins-PCPVT-L at 3x: the settings of its smaller models.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="twins_pcpvt_large", pretrained="in1k", style="official", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
