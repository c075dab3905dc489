"""Every change that the commands make to OpenMMLab's packages at run time, with its reason; `apply` makes them all.

What takes the place of a method is in the module of its subject and gets the method as its first argument. One change
is not here, because a training by a framework's own tools needs it, too: rules for parameters, in
`hvt_backbones.openmmlab`. Nor is what is set on an object of one run: `BadStepHook` takes the place of its optimiser
wrapper's `update_params`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hvt_backbones.errors import InputError

MARK = "_hvt_replaced"
ACCEPTED_MMCV = "2.1.0"  # the last that mmaction2 1.2.0 takes
LAST_TRANSFORMERS = 4
DRN = "mmaction.models.localizers.drn"


def apply(scope: str) -> None:
    """Import a framework and change what it and MMEngine do, for this process and those forked from it; once.

    Args:
        scope: "mmdet", "mmseg" or "mmaction".
    """
    import_framework(scope)
    from mmcv.transforms import LoadImageFromFile
    from mmengine.dataset import BaseDataset
    from mmengine.runner import CheckpointLoader

    from . import annotation_guard, checkpoints, data, maps, pictures

    # It unpickles a file with all that it would run where PyTorch's restricted reader refuses it
    # (open-mmlab/mmengine#1655). `load_from`, `resume`, `last_checkpoint` and every `init_cfg` pass through it.
    CheckpointLoader.load_checkpoint = staticmethod(checkpoints.load)
    # OpenCV brings pictures upright by EXIF, annotations and maps may be of the pixels as stored
    # (open-mmlab/mmcv#1091 lets a whole data set choose, not a picture)
    _replace(LoadImageFromFile, "transform", pictures.load_as_annotated)
    # what is wrong with a file shows as a traceback of OpenCV's, and an empty data set as none (no issue known)
    _replace(BaseDataset, "prepare_data", data.prepare_named)
    _replace(BaseDataset, "_serialize_data", data.serialize_checked)
    if "mmdet.datasets" in sys.modules:
        from mmdet.datasets import BaseDetDataset
        from mmdet.datasets.api_wrappers import COCO
        from mmdet.evaluation import CocoMetric

        # annotations without `area` or `height` are KeyErrors hours later (open-mmlab/mmdetection#804, #4139), an id
        # of 0 is scored 0 by pycocotools, silently
        _replace(BaseDetDataset, "full_init", annotation_guard.full_init)
        _replace(COCO, "__init__", annotation_guard.open_file)
        _replace(COCO, "createIndex", annotation_guard.create_index)
        _replace(COCO, "get_cat_ids", annotation_guard.get_cat_ids)
        _replace(CocoMetric, "__init__", annotation_guard.open_metric)
        _replace_setter(CocoMetric, "dataset_meta", annotation_guard.set_meta)
    if scope == "mmseg":
        from mmseg.datasets import BaseSegDataset
        from mmseg.datasets.transforms import LoadAnnotations

        # it makes uint8 of all numbers, so that 257 is 1; what is of no class ends in an assertion of CUDA's (no issue
        # known)
        _replace(BaseSegDataset, "get_data_info", maps.get_data_info)
        _replace(LoadAnnotations, "_load_seg_map", maps.load_seg_map)


def use_device(kind: str) -> None:
    """Let models, checkpoints and autocast use "cpu", "cuda" or "npu": MMEngine takes the machine's accelerator."""
    import mmengine.device.utils

    mmengine.device.utils.DEVICE = kind


@contextlib.contextmanager
def named_bases(config: Callable[[str], Any]) -> Iterator[None]:
    """Let `_base_` of a configuration name another one as the commands do, in place of a file that does not exist.

    Args:
        config: the configuration of a name; raises InputError where it is none.
    """
    from mmengine.config import Config

    find = Config._get_cfg_path

    with tempfile.TemporaryDirectory() as folder:

        def find_named(base: str, filename: str) -> tuple[str, str | None]:
            if "::" in base or Path(filename).parent.joinpath(base).is_file():
                return find(base, filename)
            path = Path(folder, f"{Path(base).name.removesuffix('.py')}.py")
            try:
                config(path.stem).dump(path)
            except InputError as error:
                raise InputError(f"_base_ {base!r} of {filename} is no file, and {error}") from error
            return str(path), None

        Config._get_cfg_path = staticmethod(find_named)
        try:
            yield
        finally:
            Config._get_cfg_path = staticmethod(find)


def _replace(owner: type, name: str, new: Callable[..., Any]) -> None:
    """Call `new(method, *arguments)` in place of a method."""
    method = getattr(owner, name)
    if hasattr(method, MARK):
        return

    @functools.wraps(method)
    def replaced(*args: Any, **arguments: Any) -> Any:
        return new(method, *args, **arguments)

    setattr(replaced, MARK, True)
    setattr(owner, name, replaced)


def _replace_setter(owner: type, name: str, new: Callable[[Callable[[Any, Any], None], Any, Any], None]) -> None:
    """Call `new(setter, object, value)` in place of a property's setter."""
    before = getattr(owner, name)
    if hasattr(before.fset, MARK):
        return

    def setter(one: Any, value: Any) -> None:
        new(before.fset, one, value)

    setattr(setter, MARK, True)
    setattr(owner, name, before.setter(setter))


# ---- imports ----


def import_framework(scope: str) -> None:
    """Import a framework with all that it registers; modules that workers load call it, too.

    Whatever is in the way is replaced for as long as the import takes, and put back.
    """
    _import_mmdet()  # the detectors of mmaction2 and the losses of mmsegmentation import it
    with _silence():
        if scope == "mmseg":
            importlib.import_module("mmseg.datasets")
    if scope == "mmaction" and "mmaction.models" not in sys.modules:
        _import_mmaction()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """mmdetection and mmsegmentation print that they do without OneDL."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _import_mmdet() -> None:
    if "mmdet.datasets" not in sys.modules and find_spec("mmdet") is not None:
        with _silence():
            importlib.import_module("mmdet.datasets")
    # configurations `mmseg::...` are looked up under the name of mmsegmentation's package before the fork
    try:
        importlib.metadata.distribution("mmsegmentation")
    except importlib.metadata.PackageNotFoundError:
        from mmengine.config.utils import MODULE2PACKAGE

        MODULE2PACKAGE["mmseg"] = "mmseg"


def _import_mmaction() -> None:
    """mmaction2 1.2.0, the last release, or a checkout, beside the maintained mmcv."""
    import mmcv

    version = mmcv.__version__
    if _version("mmaction2") in (None, "1.2.0"):
        # it asserts mmcv < 2.2 in its first lines, and works with later ones (open-mmlab/mmcv#3096)
        mmcv.__version__ = ACCEPTED_MMCV
    try:
        import mmaction
    finally:
        mmcv.__version__ = version
    modules: dict[str, ModuleType] = {}
    # its wheel lacks a localizer that it imports (open-mmlab/mmaction2#2714)
    if not (Path(mmaction.__file__).parent / "models" / "localizers" / "drn").is_dir():
        modules |= {name: _module(name, DRN=MissingDRN) for name in (DRN, f"{DRN}.drn")}
    # it needs importlib_metadata without asking for it; and its video-text models, which are written for transformers
    # 4, end the import of everything else where a later one is installed (no issue known)
    transformers = _version("transformers")
    too_new = transformers is not None and int(transformers.partition(".")[0]) > LAST_TRANSFORMERS
    if too_new or find_spec("importlib_metadata") is None:
        modules["importlib_metadata"] = _module(
            "importlib_metadata",
            PackageNotFoundError=importlib.metadata.PackageNotFoundError,
            distribution=_distribution_without_transformers if too_new else importlib.metadata.distribution,
        )
    with _stand_ins(modules):
        from mmaction.utils import register_all_modules

        register_all_modules(init_default_scope=False)


@contextlib.contextmanager
def _stand_ins(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


class MissingDRN:
    """Stands for the one localizer whose code is not in mmaction2's wheel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("DRN is not in the published package of mmaction2 (open-mmlab/mmaction2#2714)")


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
