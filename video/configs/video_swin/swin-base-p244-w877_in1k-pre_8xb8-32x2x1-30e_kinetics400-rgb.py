# Video Swin-B from Swin-B of ImageNet-1K, as in its authors' code: batches of 8 x 64.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/kinetics400.py",
    "../_base_/schedules/swin_30e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="video_swin_base", pretrained="swin_base.in1k", drop_path_rate=0.3),
    cls_head=dict(in_channels=1024),
)
optim_wrapper = dict(accumulative_counts=8)
