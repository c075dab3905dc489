"""Shared by the tests of the adapter."""

from runner.patches import import_framework

import_framework("mmdet")
