# Video Swin-L from Swin-L of ImageNet-22K, as in mmaction2: batches of 64. Its authors' code has no Swin-L.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/kinetics400.py",
    "../_base_/schedules/swin_30e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="video_swin_large", pretrained="swin_large.in22k", drop_path_rate=0.4),
    cls_head=dict(in_channels=1536),
)
