# Video Swin-T from Swin-T of ImageNet-1K, as in its authors' code: batches of 4 x 64.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/kinetics400.py",
    "../_base_/schedules/swin_30e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="video_swin_tiny", pretrained="swin_tiny.in1k", drop_path_rate=0.1),
    cls_head=dict(in_channels=768),
)
optim_wrapper = dict(optimizer=dict(weight_decay=0.02), accumulative_counts=4)
