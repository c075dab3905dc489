"""Shifted-window attention: one contract, several implementations."""

from .dispatch import IMPLEMENTATIONS, use_attention, window_attention
from .sequential import BiasTable

__all__ = ["IMPLEMENTATIONS", "BiasTable", "use_attention", "window_attention"]
