# Video Swin of two stages on drawn clips: minutes on two CPU cores.
# `python -m video.demo` draws the clips, pretrains a 2-D Swin and trains with this configuration, in which it names the
# pretrained weights, which are inflated; without them it starts from random ones.
_base_ = [
    "../_base_/models/video_swin.py",
    "../_base_/datasets/kinetics400.py",
    "../_base_/schedules/swin_30e.py",
    "../_base_/default_runtime.py",
]

classes = ("left", "right", "up", "down", "counterclockwise", "clockwise", "shrink", "grow")
data_root = "outputs/data/shapes_video"

model = dict(
    backbone=dict(
        name="video_swin_tiny",
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=((4, 4, 4), (4, 6, 6)),
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
    cls_head=dict(num_classes=8, dropout_ratio=0.0, init_std=0.2),
    test_cfg=None,
)

# what is mirrored goes the other way, and turns the other way
mirrored = {0: 1, 1: 0, 4: 5, 5: 4}
train_pipeline = [
    dict(type="DecordInit"),
    dict(type="SampleFrames", clip_len=8, frame_interval=2, num_clips=1),
    dict(type="DecordDecode"),
    dict(type="RandomCrop", size=48),
    dict(type="Flip", flip_ratio=0.5, flip_label_map=mirrored),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
val_pipeline = [
    dict(type="DecordInit"),
    dict(type="SampleFrames", clip_len=8, frame_interval=2, num_clips=1, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="CenterCrop", crop_size=48),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
test_pipeline = [
    dict(type="DecordInit"),
    dict(type="SampleFrames", clip_len=8, frame_interval=2, num_clips=4, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="ThreeCrop", crop_size=48),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file=f"{data_root}/kinetics400_train_list_videos.txt",
        data_prefix=dict(video=f"{data_root}/videos_train"),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=40,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        ann_file=f"{data_root}/kinetics400_val_list_videos.txt",
        data_prefix=dict(video=f"{data_root}/videos_val"),
        metainfo=dict(classes=classes),
        pipeline=val_pipeline,
    ),
)
test_dataloader = dict(val_dataloader, batch_size=8, dataset=dict(val_dataloader["dataset"], pipeline=test_pipeline))

# Inflated weights are alike along time. Position biases and tubes, in which the order of frames has to show, learn
# faster than the rest, and the head begins with larger weights: with 2 times for the tubes and 0.05 nothing was learnt
# in 300 iterations.
train_cfg = dict(max_epochs=24, val_interval=4)
optim_wrapper = dict(
    optimizer=dict(lr=0.002, weight_decay=0.02),
    paramwise_cfg=dict(
        {"stages.0.downsample.proj": dict(lr_mult=10.0)},
        backbone=dict(lr_mult=1.0),
        position_bias=dict(lr_mult=20.0),
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type="CosineAnnealingLR", eta_min=0.0, T_max=24, begin=0, end=24, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=24, max_keep_ckpts=1))
randomness = dict(seed=0)
