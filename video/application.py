"""What the commands of video say to those that they share with detection and segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvt_backbones.errors import InputError
from runner.application import Application

from .zoo import ZOO


def adapt(cfg: Any) -> None:
    """Let labels be checked against the model's classes, clips that are left out be counted, batches be of any size.

    mmaction2 takes `max_testing_views`, which spares memory, for batches of one alone.

    Raises:
        InputError: a pipeline samples no frames.
    """
    from runner.data import datasets_of

    from . import clips

    loaders = [cfg.get(f"{part}_dataloader") for part in ("val", "test")]
    if cfg.model.get("test_cfg") and any(loader and loader.get("batch_size", 1) > 1 for loader in loaders):
        cfg.model.test_cfg.pop("max_testing_views", None)
    count = (cfg.model.get("cls_head") or {}).get("num_classes")
    for part in ("train", "val", "test"):
        loader = cfg.get(f"{part}_dataloader")
        for dataset in datasets_of(loader["dataset"]) if loader else ():
            _check_sampling(dataset.get("pipeline") or ())
            if count and clips.type_name(dataset) == clips.ClipDataset.__name__:
                dataset.setdefault("num_classes", count)
        evaluators = cfg.get(f"{part}_evaluator") or ()
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            if clips.type_name(evaluator) == "AccMetric":
                evaluator["type"] = clips.ClipAccMetric.__name__
    hook = {"type": clips.UnreadableClipsHook.__name__}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), hook]


def _check_sampling(pipeline: Sequence[Any]) -> None:
    """
    Raises:
        InputError: a step would choose no frames, which the next one would say in its own way.
    """
    for step in pipeline:
        for key in ("clip_len", "frame_interval", "num_clips"):
            value = step.get(key, 1) if isinstance(step, Mapping) else 1
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{key} of {step.get('type')} is {value!r}: give a whole number from 1")


VIDEO = Application(
    name="video",
    scope="mmaction",
    configs=Path(__file__).parent / "configs",
    zoo=ZOO,
    layout="Kinetics' layout: data/kinetics400 with kinetics400_{train,val}_list_videos.txt (a line `path label` for "
    "each clip), videos_train/ and videos_val/",
    amp_part="backbone",  # mmaction2's heads convert what they return to NumPy, which has no bf16
    shape=(32, 224, 224),
    adapt=adapt,
)
