# The PVT setting (arXiv:2102.12122, Sec. 5.2, and its detection code), of PVTv2 and of Twins at 12 epochs: AdamW with
# little weight decay on everything, batches of 16 over 8 devices. Mask R-CNN takes twice this learning rate.
_base_ = "./swin_1x.py"

optim_wrapper = dict(_delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.0001, weight_decay=0.0001))
