"""What is run of each application. Each function yields the rows of the table, whatever goes wrong in others."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from . import drawing, recount
from .commands import ROOT, Row, memory, run

TINY_PYRAMID = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
TINY = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "pretrained": False}
CHANNELS = [8, 16, 32, 64]
QUARTERS = 4
LEAK = 1.5  # memory in the last quarter over that in the first
CPU = ("--device", "cpu")


def compare(row: Row, what: str, command: float, recounted: float, tolerance: float) -> None:
    if not abs(command - recounted) <= tolerance:
        row.faults.append(f"{what} is {command:g} by the command, {recounted:g} recounted")


# ---- classification ----


def distinct_loaders(root: Path) -> list[tuple[str, Any]]:
    """A recipe of each group with the same data and augmentation, and its configuration."""
    from classification.command_line import parse_command_line

    after_loading = ("mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
    groups: dict[str, tuple[str, Any]] = {}
    for path in sorted((ROOT / "classification" / "recipes").glob("*.yaml")):
        if path.stem == "digits":  # data of its own
            continue
        options = [
            "--data-dir",
            str(root),
            *CPU,
            "--data.workers",
            "1",
            "--batch-size",
            "32",
            "--model.pretrained",
            "false",
        ]
        config = parse_command_line([path.stem, *options])
        settings = config.as_dict()
        data = {key: value for key, value in settings["data"].items() if key not in ("batch_size", "workers")}
        augmentation = {key: value for key, value in settings["augmentation"].items() if key not in after_loading}
        groups.setdefault(json.dumps([data, augmentation], sort_keys=True), (path.stem, config))
    return list(groups.values())


def classification(folder: Path, *, short: bool) -> Iterator[Row]:
    root = drawing.draw_pictures(folder / "pictures", *((120, 48) if short else (600, 120)))
    for name, config in distinct_loaders(root):
        yield load(name, config, 200 if short else 20_000)
    yield train_classifier(folder, root, epochs=3)


def load(name: str, config: Any, samples: int) -> Row:
    """So many pictures through the loader of training, and the held-out ones, each of which must come once."""
    import torch

    from classification import data

    row, me = Row(f"classification: loader of {name}"), psutil.Process()
    start, marks, epoch = time.perf_counter(), [], 0
    try:
        training, held_out = data.open_data(config.data, config.augmentation)
        loader = data.train_loader(training, config.data, seed=0, rank=0, world=1, pin=False)
        while row.amount < samples:
            loader.batch_sampler.set_position(epoch, 0)
            for batch in data.batches(loader, torch.device("cpu")):
                row.amount += len(batch.images)
                if not torch.isfinite(batch.images).all():
                    row.faults.append(f"a batch after {row.amount} pictures holds numbers that are not finite")
                if row.amount * QUARTERS // samples > len(marks):
                    marks.append(memory(me))
                if row.amount >= samples:
                    break
            epoch += 1
        loader = data.eval_loader(held_out, 32, 1, rank=0, world=1, pin=False)
        seen = sorted(index for batch in data.batches(loader, torch.device("cpu")) for index in batch.indices.tolist())
        if seen != list(range(len(held_out))):
            row.faults.append(f"evaluation saw {len(seen)} pictures of {len(held_out)}, or some twice")
        row.peak = max(marks)
        if marks[-1] > LEAK * marks[0]:
            row.faults.append(f"memory grows, in quarters: {', '.join(f'{mark:.0f}' for mark in marks)} MiB")
    except Exception as error:  # the others are run all the same
        row.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    row.seconds = time.perf_counter() - start
    return row


def train_classifier(folder: Path, root: Path, epochs: int) -> Row:
    """A recipe to its end with a tiny model: killed and resumed; validated by two processes; top-1 recounted."""
    row, out = Row("classification: pvt_v2_b0, killed, resumed, two processes"), folder / "classifier"
    overrides = json.dumps({**TINY_PYRAMID, "drop_path_rate": 0.1})
    options = [
        "pvt_v2_b0", "--data-dir", root, "--output-dir", out, *CPU, "--epochs", epochs, "--batch-size", 12,
        "--data.workers", 1, "--data.input_size", "[3, 64, 64]", "--train.threads", 1, "--schedule.warmup_epochs", 1,
        "--output.save_steps", 4, "--output.log_steps", 4, "--model.overrides", overrides,
    ]  # fmt: skip
    run(row, "classification.train", *options, kill_when=lambda: len(list((out / "checkpoints").glob("*"))) > 1)
    said = run(row, "classification.train", *options, "--resume", "auto")
    row.amount = epochs * sum(1 for _ in (root / "train").rglob("*.JPEG"))
    if "resum" not in said.lower():
        row.faults.append("the killed run was not resumed")
    run(row, "classification.validate", out, "--data-dir", root, *CPU, "--json", folder / "val.json", processes=2)
    said = run(
        row, "hvt_backbones", "predict", out / "model_best.safetensors", root / "val", *CPU, "--json", "--top-k", 1
    )
    try:
        report = json.loads((folder / "val.json").read_text())
        answers = json.loads(said[said.index("{") : said.rindex("}") + 1])["predictions"]
        found = {answer["image"]: answer["top"][0]["class"] for answer in answers}
        truth = {str(path): int(path.parent.name[1:]) for path in sorted((root / "val").rglob("*.JPEG"))}
        compare(row, "top-1", report["top1"], recount.top1(found, truth), 0.01)
    except (OSError, ValueError, KeyError) as error:
        row.faults.append(f"nothing to recount: {error!r}")
    return row


# ---- detection, segmentation and video ----


def distinct_configs(application: str, *, short: bool) -> list[Path]:
    """One of each group with the same way from files to samples, in training and in testing; the small one of Swin.

    The first group alone, if it is to be `short`.
    """
    from mmengine.config import Config

    groups: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((ROOT / application / "configs").rglob("*.py")):
        if {"_base_", "demo"} & set(path.parts):
            continue
        cfg = Config.fromfile(path)
        ways = [cfg[f"{part}_dataloader"].dataset.to_dict() for part in ("train", "val", "test")]
        for way in ways:
            for key in ("ann_file", "data_prefix", "data_root"):
                way.pop(key, None)
        groups[json.dumps([ways, cfg.get("tta_pipeline", [])], sort_keys=True, default=str)].append(path)
    chosen = [min(paths, key=lambda path: ("swin-t" not in path.stem, path.stem)) for paths in groups.values()]
    chosen.sort(key=lambda path: (len(path.stem), path.stem))
    return chosen[:1] if short else chosen


def narrow(node: Any) -> None:
    """Widths of necks and heads, and numbers of proposals, of 256 and more become 32, in place."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(value, list | dict):
            narrow(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 256:
            node[key] = 32


def small_config(path: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """The configuration with a tiny backbone and narrow heads, and all that the data is read by as it stands."""
    from mmengine.config import Config

    cfg = Config.fromfile(path)
    model = cfg.model.to_dict()
    kept = {key: model["backbone"][key] for key in ("name", "out_indices") if key in model["backbone"]}
    backbone = {"type": "HVTBackbone", **kept, **TINY}
    sizes = model.get("data_preprocessor", {}).get("size")
    narrow(model)
    if sizes:
        model["data_preprocessor"]["size"] = sizes
    cfg.model = {**model, "backbone": backbone}
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].update(num_workers=1, batch_size=1)
    change(cfg)
    folder.mkdir(parents=True)
    cfg.dump(folder / "config.py")
    return folder / "config.py"


def train_and_test(
    row: Row, application: str, config: Path, epochs: list[str], last: str, *, tta: bool = False
) -> dict:
    """Train in one go; train on two processes; kill and resume; test. Returns the metrics."""
    folder = config.parent
    run(row, f"{application}.train", config, *CPU, "--work-dir", folder / "whole")
    run(row, f"{application}.train", config, *CPU, "--work-dir", folder / "two", "--launcher", "pytorch",
        "--cfg-options", *epochs, processes=2)  # fmt: skip
    twice = ["--cfg-options", *epochs]
    killed = folder / "killed"
    run(row, f"{application}.train", config, *CPU, "--work-dir", killed, *twice,
        kill_when=lambda: (killed / "last_checkpoint").exists())  # fmt: skip
    run(row, f"{application}.train", config, *CPU, "--work-dir", killed, *twice, "--resume")
    checkpoint = folder / "whole" / last
    for options in ([], ["--tta"]) if tta else ([],):
        run(
            row,
            f"{application}.test",
            config,
            checkpoint,
            *CPU,
            "--work-dir",
            folder / f"test{''.join(options)}",
            *options,
        )
    try:
        return json.loads((folder / "test" / "metrics.json").read_text())["metrics"]
    except OSError as error:
        row.faults.append(f"no metrics: {error.strerror}")
        return {}


def detection(folder: Path, *, short: bool) -> Iterator[Row]:
    from detection.application import DETECTION

    DETECTION.prepare()
    pictures = 12 if short else 125
    root = drawing.draw_coco(folder / "coco", pictures, 6 if short else 25)
    truth = root / "annotations" / "instances_val2017.json"
    for path in distinct_configs("detection", short=short):
        row, place = Row(f"detection: {path.stem}"), folder / path.stem
        epochs = 1 if short else 9

        def change(cfg: Any, place: Path = place, epochs: int = epochs) -> None:
            cfg.model.neck.in_channels = CHANNELS[-len(cfg.model.neck.in_channels) :]
            for part in ("train", "val", "test"):
                cfg[f"{part}_dataloader"].dataset.data_root = f"{root}/"
            cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(truth)
            cfg.test_evaluator.outfile_prefix = str(place / "found")
            cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)

        config = small_config(path, place, change)
        row.amount = epochs * pictures
        metrics = train_and_test(row, "detection", config, ["train_cfg.max_epochs=2"], f"epoch_{epochs}.pth")
        run(row, "detection.predict", config, place / "whole" / f"epoch_{epochs}.pth", root / "val2017", *CPU,
            "--out-dir", place / "drawn", "--score-thr", "0.9")  # fmt: skip
        for kind in ("bbox", "segm"):
            if f"coco/{kind}_mAP" in metrics:
                again = recount.average_precision(truth, place / f"found.{kind}.json", kind)
                compare(row, f"AP of {kind}", metrics[f"coco/{kind}_mAP"], again, 6e-4)
        yield row


def segmentation(folder: Path, *, short: bool) -> Iterator[Row]:
    from segmentation.application import SEGMENTATION

    SEGMENTATION.prepare()
    root = drawing.draw_ade(folder / "ade", *((14, 6) if short else (60, 15)))
    for path in distinct_configs("segmentation", short=short):
        row, place, steps = Row(f"segmentation: {path.stem}"), folder / path.stem, 8 if short else 1000

        def change(cfg: Any, place: Path = place, steps: int = steps) -> None:
            if "neck" in cfg.model:
                cfg.model.neck.in_channels = CHANNELS
            else:
                cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = CHANNELS, CHANNELS[2]
            for part in ("train", "val", "test"):
                cfg[f"{part}_dataloader"].dataset.data_root = str(root)
            cfg.test_evaluator.output_dir = str(place / "found")
            cfg.train_cfg.update(max_iters=steps, val_interval=steps)
            cfg.default_hooks.checkpoint.interval = max(2, steps // 4)

        config = small_config(path, place, change)
        row.amount = steps
        few = ["train_cfg.max_iters=6", "default_hooks.checkpoint.interval=2"]
        metrics = train_and_test(row, "segmentation", config, few, f"iter_{steps}.pth", tta=True)
        run(row, "segmentation.predict", config, place / "whole" / f"iter_{steps}.pth", root / "images" / "validation",
            *CPU, "--out-dir", place / "drawn")  # fmt: skip
        if metrics:
            run(
                row,
                "segmentation.test",
                config,
                place / "whole" / f"iter_{steps}.pth",
                *CPU,
                "--work-dir",
                place / "again",
            )
            drawn = sorted((root / "annotations" / "validation").glob("*.png"))
            again = recount.mean_iou(((place / "found" / one.name, one) for one in drawn), 150)
            compare(row, "mIoU", metrics["mIoU"], again, 0.02)
        yield row


def video(folder: Path, *, short: bool) -> Iterator[Row]:
    from video.application import VIDEO

    VIDEO.prepare()
    clips = 11 if short else 44
    root = drawing.draw_kinetics(folder / "kinetics", clips, 6 if short else 11)
    for path in distinct_configs("video", short=short):
        row, place, epochs = Row(f"video: {path.stem}"), folder / path.stem, 1 if short else 23

        def change(cfg: Any, epochs: int = epochs) -> None:
            cfg.model.cls_head.update(in_channels=CHANNELS[-1], num_classes=4)
            for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
                dataset = cfg[f"{part}_dataloader"].dataset
                dataset.update(ann_file=str(root / f"kinetics400_{split}_list_videos.txt"))
                dataset.pop("delimiter", None)
                dataset.data_prefix = {"video": str(root / f"videos_{split}")}
            cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)
            cfg.optim_wrapper.pop("accumulative_counts", None)

        config = small_config(path, place, change)
        row.amount = epochs * clips
        metrics = train_and_test(row, "video", config, ["train_cfg.max_epochs=2"], f"epoch_{epochs}.pth")
        run(row, "video.predict", config, place / "whole" / f"epoch_{epochs}.pth", root / "videos_val", *CPU,
            "--out-dir", place / "seen")  # fmt: skip
        if metrics:
            answers = json.loads((place / "seen" / "predictions.json").read_text())
            found = {Path(answer["path"]).name: answer["top"][0]["label"] for answer in answers}
            lines = (root / "kinetics400_val_list_videos.txt").read_text().splitlines()
            truth = {Path(line.rpartition(" ")[0]).name: int(line.rpartition(" ")[2]) for line in lines}
            compare(row, "top-1", 100 * metrics["acc/top1"], recount.top1(found, truth), 0.1)
        yield row


PARTS = {"classification": classification, "detection": detection, "segmentation": segmentation, "video": video}
