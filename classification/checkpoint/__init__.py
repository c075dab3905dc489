"""The checkpoints of a run: written whole by all its processes, verified, pruned, and gone on from."""
