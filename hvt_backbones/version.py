"""The version of the package, read by its metadata too."""

__version__ = "0.1.0"
