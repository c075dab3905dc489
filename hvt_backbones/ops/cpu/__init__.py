"""What is special for the CPU: window attention in parts that fit the cache. `dispatch` alone knows of it."""

from .attention import bmm, refuses

__all__ = ["bmm", "refuses"]
