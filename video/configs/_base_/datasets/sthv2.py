# Something-Something V2: data/sthv2/videos, and a list of each split whose lines are "path label".
# 32 frames, one of each 32nd of the whole video, and no mirror images, for which left and right are classes; testing
# takes 3 crops. The authors take RandAugment from imgaug, whose 30 levels and grey fill these are, with other
# operations in part, and erase after the normalisation, to zero, which is the mean colour before it.
_base_ = "./kinetics400.py"

train_pipeline = [
    dict(type="DecordInit"),
    dict(type="UniformSample", clip_len=32, num_clips=1),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="RandomResizedCrop"),
    dict(type="Resize", scale=(224, 224), keep_ratio=False),
    dict(type="TorchVisionWrapper", op="RandAugment", num_ops=4, magnitude=7, fill=[128.0, 128.0, 128.0]),
    dict(type="RandomErasing", erase_prob=0.25, mode="const", fill_color=(123.675, 116.28, 103.53)),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
val_pipeline = [
    dict(type="DecordInit"),
    dict(type="UniformSample", clip_len=32, num_clips=1, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 256)),
    dict(type="CenterCrop", crop_size=(224, 224)),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
test_pipeline = [
    dict(type="DecordInit"),
    dict(type="UniformSample", clip_len=32, num_clips=1, test_mode=True),
    dict(type="DecordDecode"),
    dict(type="Resize", scale=(-1, 224)),
    dict(type="ThreeCrop", crop_size=(224, 224)),
    dict(type="FormatShape", input_format="NCTHW"),
    dict(type="PackActionInputs"),
]
data_root = "data/sthv2"
train_dataloader = dict(
    dataset=dict(
        ann_file=f"{data_root}/sthv2_train_list_videos.txt",
        data_prefix=dict(video=f"{data_root}/videos"),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        ann_file=f"{data_root}/sthv2_val_list_videos.txt",
        data_prefix=dict(video=f"{data_root}/videos"),
        pipeline=val_pipeline,
    )
)
test_dataloader = dict(dataset=dict(val_dataloader["dataset"], pipeline=test_pipeline))
