# Video Swin's training (arXiv:2106.13230, Sec. 4.1, and its code): AdamW, 30 epochs of which 2.5 are warm-up, 8 devices
# of 8 videos, whose gradients are summed over several steps. The config says the weight decay, the number of steps and
# the learning rate, which is the head's: the backbone has a tenth of it.
# This constructor multiplies what all keys say that are in a parameter's name. Of MMEngine's own the longest key alone
# counts: norms would keep their decay, and the position biases the whole learning rate.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=30, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2.5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, T_max=30, by_epoch=True, begin=0, end=30),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=0.001, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="SwinOptimWrapperConstructor",
    paramwise_cfg=dict(
        backbone=dict(lr_mult=0.1),
        position_bias=dict(decay_mult=0.0),
        norm=dict(decay_mult=0.0),
    ),
)
default_hooks = dict(
    runtime_info=dict(type="RuntimeInfoHook"),
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=100, ignore_last=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=5),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
auto_scale_lr = dict(enable=False, base_batch_size=64)  # of one step; the sum over steps stays as it is
