# Mask R-CNN over a Swin of 1.5 million parameters on drawn shapes: minutes on two CPU cores.
# `python -m detection.demo` draws the pictures, pretrains the backbone and trains with this configuration, in which
# it names the pretrained weights; without them it starts from random ones.
_base_ = [
    "../_base_/models/mask-rcnn_fpn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/swin_1x.py",
    "../_base_/default_runtime.py",
]

classes = ("disc", "ring", "square", "star", "triangle")
data_root = "outputs/data/shapes_detection/"

# the standard model with fewer channels and proposals; its anchors, which begin at 32 pixels, begin at 8 here
model = dict(
    backbone=dict(
        name="swin_tiny",
        window_size=4,
        embed_dim=32,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        drop_path_rate=0.0,
    ),
    neck=dict(out_channels=48, num_outs=4),
    rpn_head=dict(
        feat_channels=48,
        anchor_generator=dict(scales=[2, 2.8], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, finest_scale=14),
        bbox_head=dict(fc_out_channels=192, num_classes=5),
        mask_roi_extractor=dict(out_channels=48, finest_scale=14),
        mask_head=dict(num_convs=2, conv_out_channels=48, num_classes=5),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=48)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=50)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale_factor=1.0),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale_factor=1.0),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=dict(classes=classes),
        filter_cfg=dict(filter_empty_gt=False),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=14, val_interval=4)
optim_wrapper = dict(
    optimizer=dict(lr=0.0015),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.35)}),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type="CosineAnnealingLR", eta_min=1e-5, begin=0, end=14, by_epoch=True, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=14, max_keep_ckpts=1))
randomness = dict(seed=0)
