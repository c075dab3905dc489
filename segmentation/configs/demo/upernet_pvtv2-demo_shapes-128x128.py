# UPerNet over a PVTv2 of a million parameters on drawn shapes: minutes on two CPU cores.
# `python -m segmentation.demo` draws the pictures, pretrains the backbone and trains with this configuration, in which
# it names the pretrained weights; without them it starts from random ones.
_base_ = [
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/swin_160k.py",
    "../_base_/default_runtime.py",
]

# of ADE20K's 150 classes those that are on the pictures
classes = ("grass", "water", "box", "sand", "flower", "tent", "ball", "clock")
data_root = "outputs/data/shapes_segmentation/"
crop_size = (128, 128)

# the standard model with fewer channels and classes; most pixels are of the grounds, which count less for it
weights = [0.4, 0.4, 1.0, 0.4, 1.0, 1.0, 1.0, 1.0]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        name="pvt_v2_b0",
        embed_dims=(24, 48, 96, 144),
        num_heads=(1, 2, 4, 6),
        mlp_ratios=(4, 4, 4, 4),
        drop_path_rate=0.0,
    ),
    decode_head=dict(channels=48, num_classes=8, loss_decode=dict(class_weight=weights)),
    auxiliary_head=dict(channels=48, num_classes=8, loss_decode=dict(class_weight=weights)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.95),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
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
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=test_pipeline),
)
test_dataloader = val_dataloader

train_cfg = dict(max_iters=500, val_interval=125)
optim_wrapper = dict(optimizer=dict(lr=0.004), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=0, end=500),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=500))
randomness = dict(seed=0)
