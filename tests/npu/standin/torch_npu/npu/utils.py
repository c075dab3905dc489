"""`torch.npu.utils` of the stand-in."""

from __future__ import annotations


def get_soc_version() -> int:
    """Of an Atlas A2."""
    return 220
