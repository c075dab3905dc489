"""Measurements against peers, each run from a checkout: `python -m benchmarks.peers`."""
