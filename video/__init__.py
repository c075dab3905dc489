"""Action recognition on Kinetics with mmaction2: run from a checkout, `python -m video.train`."""
