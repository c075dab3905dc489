"""Shifted-window attention: one contract, several implementations."""

from .dispatch import IMPLEMENTATIONS, use_attention, window_attention

__all__ = ["IMPLEMENTATIONS", "use_attention", "window_attention"]
