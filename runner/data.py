"""Whether the data is where a configuration says, found out before anything is built."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from hvt_backbones.errors import InputError
from hvt_backbones.weights.report import some

from .annotation_guard import tell
from .findings import Findings, compare_size, describe, evenly
from .maps import gather, inspect, numbers_of, readers_of
from .parts import data_of, evaluators_of
from .pictures import resizing

SHOWN = 6  # names of a folder in a message
SAMPLE = 100  # pictures: a second or two


def check_data(cfg: Mapping[str, Any], parts: tuple[str, ...], layout: str) -> None:
    """Check files and folders of the data sets of `train_dataloader`, `val_dataloader`, ...

    Args:
        cfg: the configuration.
        parts: of "train", "val", "test"; those that the configuration leaves out are skipped.
        layout: of the standard data set, for messages.

    Raises:
        InputError: the first path that is missing or is not what it should be, and what is there instead.
    """
    for part in parts:
        if cfg.get(f"{part}_dataloader") is None:
            continue
        for dataset in data_of(cfg, part):
            for kind, path in _paths(dataset):
                _check(f"{part} data", kind, path, layout)
            _check_pairs(f"{part} data", dataset)
        for evaluator in evaluators_of(cfg, part):
            if (file := evaluator.get("ann_file")) and _is_local(evaluator, file):
                _check(f"{part}_evaluator", "file", Path(file), layout)


def prepare_named(prepare_data: Callable[..., Any], dataset: BaseDataset, index: int) -> Any:
    """In place of `BaseDataset.prepare_data`: what cannot be loaded or resized is an `InputError` that names it."""
    try:
        return prepare_data(dataset, index)
    except InputError:  # which names the file
        raise
    except Exception as error:  # OpenCV, PIL and MMCV have many
        files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
        sample = dataset.get_data_info(index)
        names = " or ".join(sample[key] for key in ("img_path", "seg_map_path", "filename") if sample.get(key))
        if not any(Path(file).name == "loading.py" for file in files):
            with resizing(names):
                raise
        raise InputError(f"{names} cannot be loaded ({describe(error)}): replace it or leave it out") from error


def serialize_checked(serialize_data: Callable[..., Any], dataset: BaseDataset) -> Any:
    """In place of `BaseDataset._serialize_data`: an `InputError` for a data set that is wrong as a whole.

    It has no sample; annotations lack a class, with which mmdetection gives the others wrong numbers; or the quick part
    of `check` finds something.
    """
    where = dataset.ann_file or dataset.data_prefix.get("img_path") or dataset.data_root
    classes = dataset.metainfo.get("classes") or ()
    found = getattr(dataset, "cat_ids", classes)  # of mmdetection: those of the annotations with these names
    if len(found) < len(classes):
        raise InputError(
            f"{where} has {len(found)} of the {len(classes)} classes {some(list(classes))}: "
            "name those that it has by the data set's metainfo.classes"
        )
    if not dataset.data_list:
        raise InputError(f"{where} holds no sample, or none that filter_cfg keeps")
    check_samples(dataset)
    return serialize_data(dataset)


def _is_local(config: Mapping[str, Any], path: str) -> bool:
    return config.get("backend_args") is None and "://" not in path


def _paths(dataset: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    root = dataset.get("data_root") or ""
    prefixes = dataset.get("data_prefix") or {}
    named = [("file", dataset.get("ann_file")), *(("folder", prefix) for prefix in prefixes.values())]
    for kind, name in named:
        if isinstance(name, str) and name and _is_local(dataset, os.path.join(root, name)):
            yield kind, Path(root) / name


def _check(what: str, kind: str, path: Path, layout: str) -> None:
    if kind == "file" and path.is_file():
        return
    if kind == "folder" and path.is_dir():
        if not any(path.iterdir()):
            raise InputError(f"{what}: the folder {path} is empty; expected {layout}")
        return
    if path.exists():
        found = f"{path} is a {'folder' if path.is_dir() else 'file'}, not a {kind}"
    else:
        found = f"{kind} {path} does not exist, {_around(path)}"
    raise InputError(f"{what}: {found}; expected {layout}")


def _around(path: Path) -> str:
    """What there is in the nearest folder that exists."""
    folder = next(parent for parent in [*path.parents, Path(".")] if parent.is_dir())
    missing = path.relative_to(folder).parts[0] if path != folder else ""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    holds = f"holds {', '.join(names[:SHOWN])}{more}" if names else "is empty"
    where = "the current folder" if folder == Path(".") else str(folder)
    return f"{where} {holds}" if folder != path.parent or names else f"{where} is empty: no {missing}"


def _check_pairs(what: str, dataset: Mapping[str, Any]) -> None:
    """Segmentation: each picture has its map. mmsegmentation would find out at the picture, hours later."""
    prefixes, root = dataset.get("data_prefix") or {}, dataset.get("data_root") or ""
    if "seg_map_path" not in prefixes or dataset.get("ann_file") or not _is_local(dataset, root):
        return
    images, maps = Path(root) / prefixes["img_path"], Path(root) / prefixes["seg_map_path"]
    suffix = dataset.get("img_suffix", ".jpg")
    map_suffix = dataset.get("seg_map_suffix", ".png")
    names = {name.removesuffix(suffix) for name in os.listdir(images) if name.endswith(suffix)}
    if not names:
        raise InputError(f"{what}: {images} holds no {suffix} pictures, {_around(images / 'x')}")
    drawn = {name.removesuffix(map_suffix) for name in os.listdir(maps)}
    if lacking := sorted(names - drawn):
        raise InputError(
            f"{what}: {len(lacking)} of {len(names)} pictures in {images} have no map in {maps}: first "
            f"{lacking[0]}{map_suffix}; expected a {map_suffix} file of the same name for each {suffix} file"
        )


# ---- the quick part of `check`, before every training and test ----


def check_samples(dataset: Any) -> None:
    """Look at some samples of a data set that has just listed them; all of a small one.

    Raises:
        InputError: a picture's size is not what its annotations say, or its map is none.
    """
    segmentation = is_segmentation(dataset)
    samples = [sample for sample in evenly(dataset.data_list, SAMPLE) if is_local(sample)]
    if getattr(dataset, "backend_args", None) is not None or not samples:
        return
    if segmentation and "seg_map_path" in samples[0] and readers_of(dataset):
        numbers = numbers_of(dataset)
        found = (inspect((sample["img_path"], sample["seg_map_path"]), numbers) for sample in samples)
        findings = Findings(str(dataset.data_prefix["seg_map_path"]))
        gather(findings, found, dataset.metainfo.get("classes") or (), len(dataset.data_list))
        tell(findings, "segmentation")
    elif not segmentation and "height" in samples[0] and "width" in samples[0]:
        findings = Findings(str(dataset.ann_file))
        for sample in samples:
            if (odd := compare_size((sample["img_path"], (sample["height"], sample["width"])))) is not None:
                findings.add(*odd)
        tell(findings, "detection")


def is_local(sample: Mapping[str, Any]) -> bool:
    return isinstance(sample.get("img_path"), str) and "://" not in sample["img_path"]


def is_segmentation(dataset: Any) -> bool:
    """Whether it is one of mmsegmentation's."""
    framework = sys.modules.get("mmseg.datasets")  # which has been imported if it is
    return framework is not None and isinstance(dataset, framework.BaseSegDataset)
