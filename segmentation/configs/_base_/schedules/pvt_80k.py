# The PVT setting (arXiv:2102.12122, Sec. 5.3), of Twins too: AdamW with little weight decay on everything, batches of
# 16. Swin, PVTv2 and Twins are compared under it. The code of PVTv2 takes 40000 steps of 32 at twice this learning
# rate, which are as many pictures.
_base_ = "./swin_160k.py"

train_cfg = dict(max_iters=80000, val_interval=8000)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=80000, by_epoch=False)]
optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.0001, weight_decay=0.0001))
default_hooks = dict(checkpoint=dict(interval=8000))
