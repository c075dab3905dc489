# Video Swin's training on Something-Something V2 (arXiv:2106.13230, Sec. 4.1, and its code): twice as long.
_base_ = "./swin_30e.py"

train_cfg = dict(max_epochs=60)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2.5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, T_max=60, by_epoch=True, begin=0, end=60),
]
