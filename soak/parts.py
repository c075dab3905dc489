"""What is run of each application. Each function yields the rows of the table, whatever goes wrong in others."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import drawing, recount
from .commands import Row, run
from .loading import distinct_loaders

if TYPE_CHECKING:
    from runner.application import Application

TINY_PYRAMID = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
TINY = {"embed_dim": 4, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "pretrained": False}
CPU = ("--device", "cpu")
METRICS = "metrics.json"


def compare(row: Row, what: str, command: float, recounted: float, tolerance: float) -> None:
    if not abs(command - recounted) <= tolerance:
        row.faults.append(f"{what} is {command:g} by the command, {recounted:g} recounted")


# ---- classification ----


def classification(folder: Path, *, short: bool) -> Iterator[Row]:
    root = drawing.draw_pictures(folder / "pictures", *((120, 48) if short else (600, 120)))
    names = [name for name, _ in distinct_loaders(root)]
    for together in [names] if short else [[name] for name in names]:  # a process each takes seconds to start
        row = Row(f"classification: loader of {together[0]}" + (f" and {len(together) - 1} more" if short else ""))
        said = run(row, "soak.loading", root, 200 if short else 20_000, *together, may_grow=True)
        answers = [json.loads(line) for line in said.splitlines() if line.startswith('{"amount"')]
        row.amount = sum(answer["amount"] for answer in answers)
        row.faults += [fault for answer in answers for fault in answer["faults"]]
        if len(answers) < len(together):
            row.faults.append(f"only {len(answers)} of {len(together)} loaders came to their end")
        yield row
    yield train_classifier(folder, root, epochs=3)


def train_classifier(folder: Path, root: Path, epochs: int) -> Row:
    """A recipe to its end with a tiny model: killed and resumed; validated by two processes; top-1 recounted."""
    row, out = Row("classification: pvt_v2_b0, killed, resumed, validated by two processes"), folder / "classifier"
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
    best = out / "model_best.safetensors"
    said = run(row, "hvt_backbones", "predict", best, root / "val", *CPU, "--json", "--top-k", 1)
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


def distinct_configs(application: Application, *, short: bool) -> list[str]:
    """One of each group with the same way from files to samples, in training and in testing; the small one of Swin.

    The first group alone, if it is to be `short`.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in application.rows:
        cfg = application.config(name)
        ways = [cfg[f"{part}_dataloader"].dataset.to_dict() for part in ("train", "val", "test")]
        for way in ways:
            for key in ("ann_file", "data_prefix", "data_root"):
                way.pop(key, None)
        groups[json.dumps([ways, cfg.get("tta_pipeline", [])], sort_keys=True, default=str)].append(name)
    chosen = [min(names, key=lambda name: ("swin-t" not in name, name)) for names in groups.values()]
    chosen.sort(key=lambda name: (len(name), name))
    return chosen[:1] if short else chosen


def narrow(node: Any) -> None:
    """Widths of necks and heads, and numbers of proposals, of 256 and more become 16, in place."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(value, list | dict):
            narrow(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 256:
            node[key] = 16


def small_config(name: str, application: Application, folder: Path, change: Callable[[Any], None]) -> Path:
    """The configuration with a tiny backbone and narrow heads, and all that the data is read by as it stands."""
    cfg = application.config(name)
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


def each(
    application: Application, folder: Path, soak: Callable[[Row, str, Path], None], *, short: bool
) -> Iterator[Row]:
    """`soak(row, configuration, empty folder)` of the distinct configurations."""
    for name in distinct_configs(application, short=short):
        row = Row(f"{application.name}: {name}", short=short)
        try:
            soak(row, name, folder / name)
        except Exception as error:  # the others are run all the same
            row.faults.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        yield row


def train_and_test(row: Row, application: str, config: Path, last: str, shorter: list[str]) -> dict[str, float]:
    """Train in one go; on two processes; killed and resumed; test by one process and by two.

    Args:
        last: the checkpoint at the end.
        shorter: options with which a run saves a checkpoint before its end, and ends soon.

    Returns:
        The metrics.
    """
    from runner.checkpoints import read_checkpoint

    folder, two = config.parent, {"processes": 2}
    train, test = f"{application}.train", f"{application}.test"
    many, options = ("--launcher", "pytorch"), ("--cfg-options", *shorter)
    run(row, train, config, *CPU, "--work-dir", folder / "whole")
    checkpoint = folder / "whole" / last
    row.amount = read_checkpoint(checkpoint)["meta"]["iter"]
    for scalars in (folder / "whole").glob("*/vis_data/scalars.json"):
        for line in scalars.read_text().splitlines():
            bad = [f"{key} {value}" for key, value in json.loads(line).items() if not math.isfinite(value)]
            # a class that occurs nowhere has no IoU, and a norm is looked at before it is clipped
            row.faults += [f"the log has {one}" for one in bad if "loss" in one or "grad_norm" in one]
    run(row, train, config, *CPU, "--work-dir", folder / "two", *many, *options, **two)
    killed = folder / "killed"
    begun = (killed / "last_checkpoint").exists
    run(row, train, config, *CPU, "--work-dir", killed, *options, kill_when=begun)
    if "resumed epoch: " not in run(row, train, config, *CPU, "--work-dir", killed, *options, "--resume"):
        row.faults.append("the killed run was not resumed")
    run(row, test, config, checkpoint, *CPU, "--work-dir", folder / "test")
    run(row, test, config, checkpoint, *CPU, "--work-dir", folder / "test-two", *many, **two)
    one, other = (json.loads((folder / name / METRICS).read_text())["metrics"] for name in ("test", "test-two"))
    for name, value in one.items():
        if "time" not in name:
            compare(row, f"{name} of two processes", other.get(name, math.nan), value, 1e-6)
    return one


def detection(folder: Path, *, short: bool) -> Iterator[Row]:
    from detection.zoo import DETECTION
    from runner import patches

    patches.import_framework("mmdet")
    pictures, epochs = (8, 1) if short else (130, 8)
    root = drawing.draw_coco(folder / "coco", pictures, 3 if short else 15)
    truth = root / "annotations" / "instances_val2017.json"
    few = ["train_cfg.max_epochs=2", "train_dataloader.dataset.indices=30"]

    def soak(row: Row, name: str, place: Path) -> None:
        def change(cfg: Any) -> None:
            if "bbox_head" in cfg.model:  # of one stage: a ninth of the anchors, the loss of which takes most of a step
                cfg.model.bbox_head.anchor_generator.update(scales_per_octave=1, ratios=[1.0])
            cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg).score_thr = 0.0
            for part in ("train", "val", "test"):
                cfg[f"{part}_dataloader"].dataset.data_root = f"{root}/"
            cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(truth)
            cfg.test_evaluator.outfile_prefix = str(place / "found")
            cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)

        config = small_config(name, DETECTION, place, change)
        last = f"epoch_{epochs}.pth"
        metrics = train_and_test(row, "detection", config, last, few)
        drawn = ("--out-dir", place / "drawn", "--score-thr", 0.9)
        run(row, "detection.predict", config, place / "whole" / last, root / "val2017", *CPU, *drawn)
        for kind in ("bbox", "segm"):
            if f"coco/{kind}_mAP" in metrics:
                again = recount.average_precision(truth, place / f"found.{kind}.json", kind)
                compare(row, f"AP of {kind}", metrics[f"coco/{kind}_mAP"], again, 6e-4)  # the command's are rounded

    yield from each(DETECTION, folder, soak, short=short)


def segmentation(folder: Path, *, short: bool) -> Iterator[Row]:
    from runner import patches
    from segmentation.zoo import SEGMENTATION

    patches.import_framework("mmseg")
    from mmseg.datasets import ADE20KDataset

    root, steps = drawing.draw_ade(folder / "ade", *((8, 2) if short else (60, 8))), 8 if short else 1000
    maps = sorted((root / "annotations" / "validation").glob("*.png"))
    classes = {key: ADE20KDataset.METAINFO[key][: drawing.ADE_CLASSES] for key in ("classes", "palette")}

    def soak(row: Row, name: str, place: Path) -> None:
        def change(cfg: Any) -> None:
            if "neck" not in cfg.model:
                cfg.model.decode_head.pool_scales = (2, 3, 6)  # not to a pixel, one of which has no batch norm
            for part in ("train", "val", "test"):
                cfg[f"{part}_dataloader"].dataset.update(data_root=str(root), metainfo=classes)
            cfg.test_evaluator.output_dir = str(place / "found")
            cfg.train_cfg.update(max_iters=steps, val_interval=steps)
            cfg.default_hooks.checkpoint.interval = steps

        config = small_config(name, SEGMENTATION, place, change)
        last = f"iter_{steps}.pth"
        shorter = ["train_cfg.max_iters=24", "train_cfg.val_interval=24", "default_hooks.checkpoint.interval=4"]
        metrics = train_and_test(row, "segmentation", config, last, shorter)
        views = ("--tta", "--cfg-options", f"test_evaluator.output_dir={place / 'found-tta'}")
        run(row, "segmentation.test", config, place / "whole" / last, *CPU, "--work-dir", place / "tta", *views)
        pictures = (root / "images" / "validation", "--out-dir", place / "drawn")
        run(row, "segmentation.predict", config, place / "whole" / last, *pictures, *CPU)
        averaged = json.loads((place / "tta" / METRICS).read_text())["metrics"]
        for found, counted in (("found", metrics), ("found-tta", averaged)):
            again = recount.mean_iou(((place / found / one.name, one) for one in maps), drawing.ADE_CLASSES)
            compare(row, f"mIoU of {found}", counted["mIoU"], again, 0.02)

    yield from each(SEGMENTATION, folder, soak, short=short)


def video(folder: Path, *, short: bool) -> Iterator[Row]:
    from runner import patches
    from video.zoo import VIDEO

    patches.import_framework("mmaction")
    clips, epochs = (8, 1) if short else (44, 23)
    root = drawing.draw_kinetics(folder / "kinetics", clips, 3 if short else 11)
    few = ["train_cfg.max_epochs=2", "train_dataloader.dataset.indices=16"]
    lines = (root / "kinetics400_val_list_videos.txt").read_text().splitlines()
    truth = {Path(line.rpartition(" ")[0]).name: int(line.rpartition(" ")[2]) for line in lines}

    def soak(row: Row, name: str, place: Path) -> None:
        def change(cfg: Any) -> None:
            cfg.model.backbone.window_size = (2, 7, 7)  # logits of 784 tokens each would take nine tenths of the time
            cfg.model.cls_head.num_classes = 4
            for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
                dataset = cfg[f"{part}_dataloader"].dataset
                dataset.ann_file = str(root / f"kinetics400_{split}_list_videos.txt")
                dataset.data_prefix = {"video": str(root / f"videos_{split}")}
            cfg.train_cfg.update(max_epochs=epochs, val_interval=epochs)

        config = small_config(name, VIDEO, place, change)
        last = f"epoch_{epochs}.pth"
        metrics = train_and_test(row, "video", config, last, few)
        seen = (root / "videos_val", root / "broken", "--out-dir", place / "seen")
        said = run(row, "video.predict", config, place / "whole" / last, *seen, *CPU, status=1)
        for clip in (root / "broken").iterdir():
            if str(clip) not in said:
                row.faults.append(f"prediction does not name {clip}, which cannot be read")
        answers = json.loads((place / "seen" / "predictions.json").read_text())
        found = {Path(answer["path"]).name: answer["top"][0]["label"] for answer in answers}
        compare(row, "top-1", 100 * metrics["acc/top1"], recount.top1(found, truth), 0.1)

    yield from each(VIDEO, folder, soak, short=short)


PARTS = {"classification": classification, "detection": detection, "segmentation": segmentation, "video": video}
