"""The image classification trainer: run from a checkout, `python -m classification.train RECIPE`."""
