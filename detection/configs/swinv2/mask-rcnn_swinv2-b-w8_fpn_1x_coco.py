# Nobody published SwinV2-B on COCO: the settings of Swin-B, and no weight decay on the scale and the position
# bias of its attention, as in its pretraining.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="swinv2_base_window8", pretrained="in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
