"""Shared by the tests of the adapter."""

from hvt_backbones.openmmlab_commands.shims import prepare_imports

prepare_imports()
