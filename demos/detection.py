"""`python -m detection.demo`: draw a small COCO, pretrain a backbone, train Mask R-CNN from it and from scratch.

Ends with 1 where average precision on held-out pictures is too low, or pretraining did not help.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from runner import command

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

CONFIGS = Path(__file__).parents[1] / "detection/configs/demo"
COLORS = {"disc": (230, 60, 60), "ring": (255, 200, 0), "square": (40, 190, 80), "star": (60, 120, 255),
          "triangle": (220, 80, 230)}  # fmt: skip
SHOWN = 8  # pictures
SHOWN_SCORE = 0.5
QUICK_EPOCHS = 3


@command
def main(argv: Sequence[str] | None) -> int:
    from detection.zoo import DETECTION

    from .coco import write_coco
    from .training import Demo, Goal, run_demo

    demo = Demo(
        application=DETECTION,
        method="Mask R-CNN",
        config=CONFIGS / "mask-rcnn_swin-demo_fpn_shapes.py",
        write_data=write_coco,
        place_data=_place_data,
        shorten=_shorten,
        goals=(
            Goal(name="bbox AP50", key="coco/bbox_mAP_50", required=0.70, quick=0.06),
            Goal(name="segm AP50", key="coco/segm_mAP_50", required=0.65, quick=0.06),
        ),
        show=_predictions,
        colors=COLORS,
    )
    return run_demo(argv, demo)


def _place_data(cfg: Config, folder: Path) -> None:
    for split in ("train", "val", "test"):
        cfg[f"{split}_dataloader"].dataset.data_root = str(folder)
    for split in ("val", "test"):
        cfg[f"{split}_evaluator"].ann_file = str(folder / "annotations/instances_val2017.json")


def _shorten(cfg: Config) -> None:
    cfg.train_cfg.update(max_epochs=QUICK_EPOCHS, val_interval=QUICK_EPOCHS)
    cfg.param_scheduler[1].end = QUICK_EPOCHS


def _predictions(runner: Runner) -> dict[str, list[NDArray]]:
    """Rows of pictures: what is there, crowds in white, and what the model finds."""
    import mmcv

    rows: dict[str, list[NDArray]] = {"truth": [], "prediction": []}
    names = runner.val_dataloader.dataset.metainfo["classes"]
    samples = (sample for batch in runner.val_dataloader for sample in runner.model.val_step(batch))
    for sample in itertools.islice(samples, SHOWN):
        picture = mmcv.imread(sample.img_path, channel_order="rgb")
        truth, found = sample.gt_instances.cpu(), sample.pred_instances.cpu()
        found = found[found.scores >= SHOWN_SCORE]
        crowds = sample.ignored_instances.masks.to_ndarray()
        rows["truth"].append(_annotate(picture, truth.masks.to_ndarray(), truth.labels, names, crowds=crowds))
        rows["prediction"].append(_annotate(picture, found.masks.numpy(), found.labels, names, found.bboxes))
    return rows


def _annotate(
    picture: NDArray, masks: NDArray, labels: Any, names: Sequence[str], boxes: Any = (), crowds: Any = ()
) -> NDArray:
    """The picture, twice as large and grey; masks in the colours of their classes, crowds in white, and boxes."""
    grey = picture.mean(2, keepdims=True).repeat(3, 2)
    for mask in crowds:
        grey[mask.astype(bool)] = 255
    for mask, label in zip(masks.astype(bool), labels, strict=True):
        grey[mask] = 0.35 * grey[mask] + 0.65 * np.array(COLORS[names[label]])
    canvas = Image.fromarray(grey.astype(np.uint8)).resize((2 * picture.shape[1], 2 * picture.shape[0]))
    draw = ImageDraw.Draw(canvas)
    for box, label in zip(boxes, labels, strict=False):
        draw.rectangle([2 * float(side) for side in box], outline=COLORS[names[label]], width=2)
    return np.asarray(canvas)
