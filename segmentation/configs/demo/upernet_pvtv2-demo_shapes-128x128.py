# UPerNet over a PVTv2 of a million parameters on drawn shapes: minutes on two CPU cores.
# `python -m segmentation.demo` draws the pictures, pretrains the backbone and trains with this configuration, in which
# it names the pretrained weights; without them it starts from random ones.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

data_root = "outputs/data/shapes_segmentation/"
crop_size = (128, 128)

# the standard model with fewer channels; all 150 classes of ADE20K, of which the pictures show 8
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        name="pvt_v2_b0",
        embed_dims=(24, 48, 96, 144),
        num_heads=(1, 2, 4, 6),
        mlp_ratios=(4, 4, 4, 4),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[24, 48, 96, 144], channels=48),
    auxiliary_head=dict(in_channels=96, channels=48),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.95),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=400, val_interval=50)
optim_wrapper = dict(optimizer=dict(lr=0.001), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=0, end=400),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400))
randomness = dict(seed=0)
