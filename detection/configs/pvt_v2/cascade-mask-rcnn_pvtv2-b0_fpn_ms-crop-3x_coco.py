# Nobody published PVTv2-B0 in Cascade Mask R-CNN: the settings of Swin, the drop path of its Mask R-CNN.
_base_ = [
    "../_base_/models/cascade-mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/swin_3x.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="pvt_v2_b0", pretrained="in1k", style="official", drop_path_rate=0.1),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
