"""Shifted-window attention: one contract, several implementations."""

from .dispatch import IMPLEMENTATIONS, takes_extent, use_attention, window_attention
from .eager import any_size
from .sequential import BiasTable

__all__ = ["IMPLEMENTATIONS", "BiasTable", "any_size", "takes_extent", "use_attention", "window_attention"]
