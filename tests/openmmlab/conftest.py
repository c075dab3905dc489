"""Shared by the tests of the adapter."""

from . import stand_ins  # noqa: F401
