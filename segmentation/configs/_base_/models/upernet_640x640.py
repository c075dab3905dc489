_base_ = "upernet.py"

model = dict(data_preprocessor=dict(size=(640, 640)), test_cfg=dict(crop_size=(640, 640), stride=(426, 426)))
