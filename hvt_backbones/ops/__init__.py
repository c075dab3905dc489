"""Shifted-window attention: one contract, several implementations."""

from .dispatch import IMPLEMENTATIONS, takes_extent, use_attention, window_attention
from .sequential import BiasTable

__all__ = ["IMPLEMENTATIONS", "BiasTable", "takes_extent", "use_attention", "window_attention"]
