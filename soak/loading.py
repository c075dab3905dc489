"""`python -m soak.loading DATA SAMPLES RECIPE ...`: the loaders of recipes in a process of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil

from .commands import GROWTH, ROOT, growth_of, memory


def distinct_loaders(root: Path) -> list[tuple[str, Any]]:
    """A recipe of each group with the same data and augmentation, and its configuration."""
    from classification.command_line import parse_command_line

    after_loading = ("mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
    groups: dict[str, tuple[str, Any]] = {}
    for path in sorted((ROOT / "classification" / "recipes").glob("*.yaml")):
        if path.stem.startswith("digits"):  # data of their own
            continue
        options = ["--data-dir", str(root), "--device", "cpu", "--data.workers", "1", "--batch-size", "32"]
        options += ["--model.pretrained", "false"]  # of a pre-training that was not run here
        config = parse_command_line([path.stem, *options])
        settings = config.as_dict()
        data = {key: value for key, value in settings["data"].items() if key not in ("batch_size", "workers")}
        augmentation = {key: value for key, value in settings["augmentation"].items() if key not in after_loading}
        groups.setdefault(json.dumps([data, augmentation], sort_keys=True), (path.stem, config))
    return list(groups.values())


def load(config: Any, samples: int) -> tuple[int, list[str]]:
    """So many pictures through the loader of training, and the held-out ones, each of which must come once.

    Returns:
        How many there were, and what went wrong.
    """
    import torch

    from classification.data import loading

    torch.set_num_threads(1)
    amount, series, epoch, me, faults = 0, [], 0, psutil.Process(), []
    training, held_out = loading.open_data(config.data, config.augmentation)
    loader = loading.train_loader(training, config.data, seed=0, rank=0, world=1, pin=False)
    while amount < samples:
        loader.batch_sampler.set_position(epoch, 0)
        for batch in loading.batches(loader, torch.device("cpu")):
            amount += len(batch.images)
            if not batch.images.sum().isfinite():
                faults.append(f"a batch after {amount} pictures holds numbers that are not finite")
            series.append(memory(me))
            if amount >= samples:
                break
        epoch += 1
    loader = loading.eval_loader(held_out, 32, 1, rank=0, world=1, pin=False)
    seen = sorted(index for batch in loading.batches(loader, torch.device("cpu")) for index in batch.indices.tolist())
    if seen != list(range(len(held_out))):
        faults.append(f"evaluation saw {len(seen)} pictures of {len(held_out)}, or some twice")
    if samples >= 1000 and (growth := growth_of(series)) > GROWTH:
        faults.append(f"memory grows: {growth:.2f} times as much in the third quarter as in the second")
    return amount, faults


if __name__ == "__main__":
    loaders = dict(distinct_loaders(Path(sys.argv[1])))
    for recipe in sys.argv[3:]:
        found, wrong = load(loaders[recipe], int(sys.argv[2]))
        print(json.dumps({"amount": found, "faults": [f"{recipe}: {fault}" for fault in wrong]}))
