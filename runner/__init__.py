"""What `python -m detection.*`, `segmentation.*` and `video.*` share: MMEngine's Runner, told what to do by a command.

Only the commands import it; its modules need the packages of OpenMMLab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from hvt_backbones.errors import InputError, exit_on_input_error

from .quiet import quiet_imports

if TYPE_CHECKING:
    from .application import Application

OPENMMLAB = ("mmengine", "mmcv", "mmdet", "mmseg", "mmaction", "imgaug")


def command(run: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """The `main(argv=None)` of a command that calls `run(argv)`, which imports what it needs.

    It returns the exit status: what `run` returns, or 0; 2 for what the user can mend, told in one line; 1 for a
    training that diverged; 130 for Ctrl-C.
    """

    def with_packages(argv: Sequence[str] | None) -> int | None:
        quiet_imports()
        try:
            return run(argv)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in OPENMMLAB:
                raise
            raise InputError(f"the package {package} is not installed: `make install-all` installs it") from error

    return exit_on_input_error(with_packages)


def shared_command(
    name: Literal["train", "test", "info", "config", "export"], application: Application
) -> Callable[..., int]:
    """The `main(argv=None)` of `python -m APPLICATION.NAME`."""

    def run(argv: Sequence[str] | None) -> int | None:
        module = import_module(".export" if name == "export" else ".run", __package__)
        return getattr(module, name)(argv, application)

    return command(run)
