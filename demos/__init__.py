"""Drawn data sets that teach something without a download, and the demos that train on them."""
