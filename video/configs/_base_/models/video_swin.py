# Video Swin (arXiv:2106.13230) under the head of I3D, as its authors' code and mmaction2 have it.
# The channels of the head are those of the backbone. In testing at most four views
# (clips x crops) of a video go through the backbone at a time, which changes memory alone and needs batches of one.
model = dict(
    type="Recognizer3D",
    data_preprocessor=dict(
        type="ActionDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        format_shape="NCTHW",
    ),
    backbone=dict(type="HVTBackbone", out_indices=(3,)),
    cls_head=dict(type="I3DHead", spatial_type="avg", dropout_ratio=0.5, average_clips="prob"),
    train_cfg=None,
    test_cfg=dict(max_testing_views=4),
)
