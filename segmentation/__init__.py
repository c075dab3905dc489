"""Semantic segmentation on ADE20K with mmsegmentation: run from a checkout, `python -m segmentation.train`."""
