"""Detection and instance segmentation on COCO with mmdetection: run from a checkout, `python -m detection.train`."""
