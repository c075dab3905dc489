# Video Swin-B from Swin-B of ImageNet-22K, as in its authors' code: batches of 8 x 64, a lower learning rate.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/kinetics400.py",
    "../_base_/schedules/swin_30e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="video_swin_base", pretrained="swin_base.in22k", drop_path_rate=0.2),
    cls_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=0.0003), accumulative_counts=8)
