# Video Swin-B with windows of 16 x 7 x 7 from one of Kinetics-400 (and ImageNet-22K), as in its authors' code.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/sthv2.py",
    "../_base_/schedules/swin_60e.py",
    "../_base_/default_runtime.py",
]

model = dict(
    backbone=dict(name="video_swin_base_window16", pretrained="in22k_ft_k400", drop_path_rate=0.4),
    cls_head=dict(in_channels=1024, num_classes=174, label_smooth_eps=0.1),
)
optim_wrapper = dict(optimizer=dict(lr=0.0003), accumulative_counts=8)
