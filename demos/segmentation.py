"""`python -m segmentation.demo`: draw a small ADE20K, pretrain a backbone, train UPerNet from it and from scratch.

Ends with 1 where the mean IoU on held-out pictures is too low, or pretraining did not help.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runner import command

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

CONFIGS = Path(__file__).parents[1] / "segmentation/configs/demo"
COLORS = {"ball": (230, 60, 60), "clock": (255, 200, 0), "box": (40, 190, 80), "flower": (60, 120, 255),
          "tent": (220, 80, 230), "grass": (170, 220, 150), "sand": (235, 220, 180),
          "water": (160, 205, 235)}  # fmt: skip
NONE = (0, 0, 0)
SHOWN = 8  # pictures
QUICK_ITERATIONS = 120


@command
def main(argv: Sequence[str] | None) -> int:
    from segmentation.zoo import SEGMENTATION

    from .ade import write_ade
    from .training import Demo, Goal, run_demo

    demo = Demo(
        application=SEGMENTATION,
        method="UPerNet",
        config=CONFIGS / "upernet_pvtv2-demo_shapes-128x128.py",
        write_data=write_ade,
        place_data=_place_data,
        shorten=_shorten,
        goals=[Goal(name="mIoU", key="mIoU", required=0.75, quick=0.36, unit=0.01)],
        show=_predictions,
        colors=COLORS,
    )
    return run_demo(argv, demo)


def _place_data(cfg: Config, folder: Path) -> None:
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = str(folder)


def _shorten(cfg: Config) -> None:
    cfg.train_cfg.update(max_iters=QUICK_ITERATIONS, val_interval=QUICK_ITERATIONS)
    cfg.param_scheduler[1].end = QUICK_ITERATIONS
    cfg.default_hooks.checkpoint.interval = QUICK_ITERATIONS


def _predictions(runner: Runner) -> dict[str, list[NDArray]]:
    """Rows of pictures: what the model sees, what is there, and what it says."""
    import mmcv

    rows: dict[str, list[NDArray]] = {"picture": [], "truth": [], "prediction": []}
    names = runner.val_dataloader.dataset.metainfo["classes"]
    samples = (sample for batch in runner.val_dataloader for sample in runner.model.val_step(batch))
    for sample in itertools.islice(samples, SHOWN):
        rows["picture"].append(mmcv.imread(sample.img_path, channel_order="rgb"))
        rows["truth"].append(_paint(sample.gt_sem_seg.data[0].cpu().numpy(), names))
        rows["prediction"].append(_paint(sample.pred_sem_seg.data[0].cpu().numpy(), names))
    return rows


def _paint(labels: NDArray, names: Sequence[str]) -> NDArray:
    """(H, W) labels as a picture, (H, W, 3); what has no label, or one that is not on the pictures, is black."""
    palette = np.array([COLORS.get(name.strip(), NONE) for name in names] + [NONE] * (256 - len(names)))
    return palette.astype(np.uint8)[labels]
