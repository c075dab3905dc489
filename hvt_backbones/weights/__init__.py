"""Weights: find, read, convert between code bases and load."""

from .convert import convert_state_dict
from .inflate import inflate
from .layouts import LAYOUTS
from .load import load_weights
from .report import LoadReport

__all__ = ["LAYOUTS", "LoadReport", "convert_state_dict", "inflate", "load_weights"]
