"""`python -m video.demo`: draw a small Kinetics, inflate a pretrained image classifier, train Video Swin from it.

Its classes are 8 motions, in pairs of two directions. Testing is that of Kinetics, 4 clips with 3 crops each, and again
with the frames of each clip shuffled. Ends with 1 where top-1 is too low, or what is left of it with shuffled frames is
not near chance: that of a class is 1/8; of the two directions it is exactly 1/2, as `demos.kinetics` explains.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runner import command

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

CONFIGS = Path(__file__).parents[1] / "video/configs/demo"
CLIPS, QUICK_CLIPS = (960, 160), (16, 8)  # to train on, held out
# The first 200 to 450 steps are a plateau, longer or shorter by chance (the seed, the rounding of a CPU), which is too
# long for --quick: it learns 16 clips by heart, in steps of all of them.
QUICK_STEPS = 80
QUICK_PRETRAINING = (160, 2)  # crops of each class, and epochs


@command
def main(argv: Sequence[str] | None) -> int:
    from video.zoo import VIDEO

    from .kinetics import MOTIONS, write_clips
    from .training import PRETRAINED, Demo, Goal, run_demo

    chance = 1 / len(MOTIONS)
    demo = Demo(
        application=VIDEO,
        method="Video Swin",
        config=CONFIGS / "swin-demo-p244_8x2x1_motions.py",
        write_data=write_clips,
        place_data=_place_data,
        shorten=_shorten,
        goals=(
            Goal(name="top-1", key="acc/top1", required=0.90, quick=0.90, chance=chance),
            # a model that sees which of place, turn and size changes, but not to which side, reaches 0.5 at most
            Goal(name="top-1, shuffled", key="shuffled/top1", required=0.5, quick=None, at_most=True, chance=chance),
            # nearly four standard deviations above chance, of 160 clips
            Goal(
                name="direction, shuffled",
                key="shuffled/direction",
                required=0.65,
                quick=None,
                at_most=True,
                chance=0.5,
            ),
        ),
        test=_test,
        show=_predictions,
        colors={},
        data="clips",
        counts=CLIPS,
        quick_counts=QUICK_CLIPS,
        quick_pretraining=QUICK_PRETRAINING,
        starts=(PRETRAINED,),
    )
    return run_demo(argv, demo)


def _place_data(cfg: Config, folder: Path) -> None:
    for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
        dataset = cfg[f"{part}_dataloader"].dataset
        dataset.ann_file = str(folder / f"kinetics400_{split}_list_videos.txt")
        dataset.data_prefix.video = str(folder / f"videos_{split}")


def _shorten(cfg: Config) -> None:
    training, held_out = (cfg[f"{part}_dataloader"].dataset for part in ("train", "val"))
    training.pipeline = held_out.pipeline
    for part in ("val", "test"):
        cfg[f"{part}_dataloader"].dataset.update(ann_file=training.ann_file, data_prefix=training.data_prefix)
    cfg.train_cfg.update(max_epochs=QUICK_STEPS, val_interval=QUICK_STEPS)
    warm_up, cosine = cfg.param_scheduler
    warm_up.end = QUICK_STEPS // 4
    cosine.update(T_max=QUICK_STEPS, end=QUICK_STEPS)
    cfg.default_hooks.checkpoint.interval = QUICK_STEPS


def shuffle_frames(results: dict[str, Any]) -> dict[str, Any]:
    """A step after `SampleFrames`: the frames of each clip in an order that follows from the file's name."""
    rng = np.random.default_rng(zlib.crc32("/".join(Path(results["filename"]).parts[-2:]).encode()))
    clips = results["frame_inds"].reshape(results["num_clips"], -1)
    results["frame_inds"] = rng.permuted(clips, axis=1).ravel()
    return results


def _test(runner: Runner) -> dict[str, float]:
    """Top-1 over all views of a clip; the same with shuffled frames, and how often the direction is right then."""
    loader = runner.test_loop.dataloader
    scores, labels = _score(runner, loader)
    steps = loader.dataset.pipeline.transforms
    sampled = next(index for index, step in enumerate(steps) if type(step).__name__ == "SampleFrames")
    steps.insert(sampled + 1, shuffle_frames)
    shuffled, _ = _score(runner, loader)
    clips, opposite = np.arange(len(labels)), labels ^ 1  # the two directions of a motion are neighbours
    return {
        "acc/top1": (scores.argmax(1) == labels).mean(),
        "shuffled/top1": (shuffled.argmax(1) == labels).mean(),
        "shuffled/direction": (shuffled[clips, labels] > shuffled[clips, opposite]).mean(),
    }


def _score(runner: Runner, loader: Any) -> tuple[NDArray, NDArray]:
    """Probabilities, (clips, classes), and labels, (clips,)."""
    import torch

    runner.model.eval()
    with torch.inference_mode():
        samples = [sample.cpu() for batch in loader for sample in runner.model.test_step(batch)]
    return np.stack([one.pred_score.numpy() for one in samples]), np.array([one.gt_label.item() for one in samples])


def _predictions(runner: Runner) -> dict[str, list[NDArray]]:
    """Of each class the frames of a held-out clip, named by the truth and what the model says."""
    from mmengine.dataset import pseudo_collate

    dataset = runner.val_dataloader.dataset
    names = dataset.metainfo["classes"]
    rows = {}
    for index in range(len(names)):  # the list has one clip of each class, then the next of each
        sample = dataset[index]
        scores = runner.model.val_step(pseudo_collate([sample]))[0].pred_score
        best = int(scores.argmax())
        row = f"{names[sample['data_samples'].gt_label.item()]}:\n{names[best]} {scores[best]:.0%}"
        rows[row] = list(sample["inputs"][0].permute(1, 2, 3, 0).numpy())
    return rows
