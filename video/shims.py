"""What lets mmaction2 1.2.0, the last release, work beside the maintained mmcv; nothing where it does so by itself.

It asserts mmcv < 2.2 while it is imported, and works with later ones. Its wheel lacks `mmaction/models/localizers/drn`,
which it imports (open-mmlab/mmaction2#2714). It uses `importlib_metadata` without asking for it. Its video-text models
are written for transformers 4 and, where a later one is installed, end the import of everything else.

Whatever is in the way of the import is replaced for as long as it takes, and put back.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hvt_backbones.openmmlab_commands import shims as common

ACCEPTED_MMCV = "2.1.0"  # the last that mmaction2 1.2.0 takes
LAST_TRANSFORMERS = 4
DRN = "mmaction.models.localizers.drn"


class MissingDRN:
    """Stands for the one localizer whose code is not in mmaction2's wheel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("DRN is not in the published package of mmaction2 (open-mmlab/mmaction2#2714)")


def prepare_imports() -> None:
    """Import mmaction with all that it registers, in this process; modules that workers load call it, too."""
    if "mmaction.models" in sys.modules:
        return
    common.prepare_imports()  # mmaction's detectors import mmdet
    _import_mmaction()
    with _stand_ins():
        from mmaction.utils import register_all_modules

        register_all_modules(init_default_scope=False)


def _import_mmaction() -> None:
    """Its first lines compare versions; the rest is imported by its submodules."""
    import mmcv

    version = mmcv.__version__
    try:
        import mmaction
    except AssertionError as error:
        if "MMCV" not in str(error):
            raise
        mmcv.__version__ = ACCEPTED_MMCV
        try:
            import mmaction  # noqa: F401
        finally:
            mmcv.__version__ = version


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules for those that mmaction cannot import, for as long as it imports them."""
    import mmaction

    modules: dict[str, ModuleType] = {}
    if not (Path(mmaction.__file__).parent / "models" / "localizers" / "drn").is_dir():
        modules |= {name: _module(name, DRN=MissingDRN) for name in (DRN, f"{DRN}.drn")}
    transformers = _version("transformers")
    too_new = transformers is not None and int(transformers.partition(".")[0]) > LAST_TRANSFORMERS
    if too_new or find_spec("importlib_metadata") is None:
        modules["importlib_metadata"] = _module(
            "importlib_metadata",
            PackageNotFoundError=importlib.metadata.PackageNotFoundError,
            distribution=_distribution_without_transformers if too_new else importlib.metadata.distribution,
        )
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _distribution_without_transformers(name: str) -> importlib.metadata.Distribution:
    """mmaction then registers what says that its video-text models are not installed."""
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return importlib.metadata.distribution(name)
