"""Evaluate a checkpoint: `python -m classification.validate CHECKPOINT --data-dir DIR`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hvt_backbones import InputError, list_models
from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import ArgumentParser, exit_on_input_error, positive_share, share, whole_number
from hvt_backbones.exported import ExportedFile, ExportedModel, open_runnable
from hvt_backbones.model_file import ModelFile, describe_weights, open_model
from hvt_backbones.predict import wordnet_ids
from hvt_backbones.processes import leave_processes
from hvt_backbones.weights.convert import read_checkpoint

from . import distributed
from .checkpoint import files
from .checkpoint.shards import SHARDS, read_whole
from .config import DataConfig, ParallelConfig, TrainConfig
from .data.loading import eval_loader, open_for_evaluation
from .data.pictures import Pictures, Unreadable
from .trainer import evaluate

# The settings that messages of the trainer's parts name -> our options
OPTIONS = {
    "data.on_error = skip": "--on-error skip",
    "data.on_error": "--on-error",
    "data.max_errors": "--max-errors",
    "data.kind": "--kind",
    "data.dir": "--data-dir",
    "data.workers": "--workers",
    "data.batch_size": "--batch-size",
    "train.amp": "--amp",
    "output.resume: ": "",
}


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m classification.validate",
        description="Top-1, top-5 and loss of a checkpoint. Files that the trainer wrote say how their pictures are "
        "prepared; for others that is the published way of the model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file or URL in any layout; a model's name; a run's folder, for its best weights, or one of its "
        "checkpoints/step_*",
    )
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="the pictures, or the folder above the split")
    parser.add_argument("--split", metavar="NAME", help="which part of DIR (default: val, if DIR has it, else DIR)")
    parser.add_argument(
        "--kind",
        choices=("imagefolder", "tar", "wds", "hfds", "mnist"),
        default="imagefolder",
        help="as data.kind of a recipe",
    )
    parser.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="at a picture that cannot be read (default: fail)"
    )
    parser.add_argument(
        "--max-errors", type=share, default=0.01, metavar="X", help="share that may be skipped (default: 0.01)"
    )
    parser.add_argument(
        "--class-order",
        choices=("natural", "text"),
        help="as data.class_order of a recipe, for files that do not name their classes (default: natural)",
    )
    parser.add_argument(
        "--class-map", metavar="FILE", help="text file: line k is the model's class (from 0) of class folder k"
    )
    parser.add_argument("--model", metavar="NAME", help="model of a file that does not say it")
    parser.add_argument("--batch-size", type=whole_number(1), default=64, metavar="N", help="per process (default: 64)")
    parser.add_argument(
        "--workers", type=whole_number(), default=2, metavar="N", help="decoding processes (default: 2)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto")
    parser.add_argument(
        "--amp",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision; auto: bf16 on accelerators that support it, else fp32",
    )
    parser.add_argument(
        "--size", type=whole_number(1), metavar="N", help="side of the input instead of the model's own"
    )
    parser.add_argument(
        "--crop-pct", type=positive_share, metavar="X", help="share that is cropped instead of the model's"
    )
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear", "nearest"))
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON to FILE, or instead of the table"
    )
    return parser


def open_checkpoint(source: str, model: str | None) -> ModelFile | ExportedFile:
    """`hvt_backbones.exported.open_runnable`, also for what the trainer leaves behind.

    Args:
        source: a run's folder stands for its best weights, or, before there are any, for its newest checkpoint; a
            checkpoint's folder, or the state in it, for the average of the weights where it holds one.
        model: name, for a file that does not say it.
    """
    path = Path(source).expanduser()
    if path.is_dir() and source not in list_models():
        if (path / files.BEST_WEIGHTS).is_file():
            return open_model(str(path / files.BEST_WEIGHTS), model)
        path = files.newest_sound(path, lambda message: print(f"warning: {message}", file=sys.stderr)) or path
        if not (path / files.MANIFEST).is_file():
            raise InputError(
                f"{source} is a folder without {files.BEST_WEIGHTS} or checkpoints of the trainer; "
                "expected a run's folder, a checkpoint's, or a file."
            )
    elif path.name == files.STATE and (path.parent / files.MANIFEST).is_file():
        path = path.parent
    else:
        return open_runnable(source, model)
    if reason := files.damage(path):
        raise InputError(f"checkpoint {path} is damaged ({reason}); give another.")
    state = files.load_state(path)
    return describe_weights(str(path), read_checkpoint(checkpoint_weights(path, state)), state["description"], model)


def checkpoint_weights(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint's folder with this `state`, whole: the average where there is one."""
    shards = path / SHARDS
    return read_whole(shards) if shards.is_dir() else state["ema"] or state["model"]


def number_classes(data: Pictures, model_file: ModelFile | ExportedFile, args: argparse.Namespace, where: str) -> None:
    """Number the classes of the pictures as the model's, by what it or the command line says of them."""
    if args.class_map is not None:
        data.use_numbers(_read_class_map(args.class_map), model_file.num_classes, f"--class-map: {args.class_map}")
    elif model_file.class_names is not None:
        data.use_classes(model_file.class_names, args.checkpoint)
    else:
        _number_for_nameless_head(data, model_file, args, where)


def _number_for_nameless_head(
    data: Pictures, model_file: ModelFile | ExportedFile, args: argparse.Namespace, where: str
) -> None:
    """As many class folders as classes are these in order; fewer must say by number or WordNet id which they are."""
    folders, count = data.class_names, model_file.num_classes
    if args.class_order is None and args.kind in ("imagefolder", "tar") and folders != sorted(folders):
        first = next(name for name, as_text in zip(folders, sorted(folders), strict=True) if name != as_text)
        print(
            f"note: {args.checkpoint} does not name its classes; class folder {first} is taken for class "
            f"{folders.index(first)}. A model that torchvision's ImageFolder numbered the classes for has it as class "
            f"{sorted(folders).index(first)}: give --class-order text for such.",
            file=sys.stderr,
        )
    if len(folders) == count and not wordnet_ids(count).keys() >= set(folders):
        return
    numbers = [str(index) for index in range(count)]
    try:
        data.use_classes(sorted(numbers) if args.class_order == "text" else numbers, args.checkpoint)
    except InputError:
        raise InputError(
            f"{args.checkpoint} tells {count} classes apart and does not name them, {where} has {len(folders)} "
            f"classes ({', '.join(folders[:3])}{', ...' if len(folders) > 3 else ''}); give the data it was trained "
            "for, name the folders by class number or ImageNet's WordNet id, or give --class-map FILE."
        ) from None
    by_value = args.class_order != "text" and all(name.isdecimal() for name in folders)
    if by_value and min(map(int, folders)) > 0:
        print(
            f"note: {args.checkpoint} does not name its classes; class folder {folders[0]} is taken for class "
            f"{int(folders[0])}, counted from 0: for folders numbered from 1, give --class-map FILE.",
            file=sys.stderr,
        )


def _read_class_map(path: str) -> list[int]:
    try:
        return [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise InputError(f"--class-map: {path} is no text file with one class index a line ({error}).") from None


def _default_split(kind: str, root: Path) -> str | None:
    there = {
        "imagefolder": (root / "val").is_dir(),
        "mnist": False,
        "tar": (root / "val").exists() or (root / "val.tar").is_file() or any(root.glob("*val-*.tar")),
        "hfds": not (root / "state.json").is_file(),  # which a single saved split has
    }
    return "val" if there["tar" if kind == "wds" else kind] else None


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the parsed command line says; returns what `--json` writes."""
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json: the folder of {args.json} does not exist; make it first.")
    model_file = open_checkpoint(args.checkpoint, args.model)
    model_file.check_head()  # before classes are compared
    preprocessing = model_file.preprocessing
    given = {
        "input_size": args.size and (preprocessing.input_size[0], args.size, args.size),
        "crop_pct": args.crop_pct,
        "interpolation": args.interpolation,
    }
    preprocessing = replace(preprocessing, **{name: value for name, value in given.items() if value})
    config = DataConfig(
        kind=args.kind,
        class_order=args.class_order or "natural",
        on_error=args.on_error,
        max_errors=args.max_errors,
    )
    root = Path(args.data_dir)
    split = args.split if args.split is not None else _default_split(args.kind, root)
    where = args.data_dir if split is None else str(root / split)
    data = open_for_evaluation(root, split, config, preprocessing)
    number_classes(data, model_file, args, where)
    model = model_file.classifier()
    accelerator = distributed.build_accelerator(TrainConfig(device=args.device, amp=args.amp), ParallelConfig())
    loader = eval_loader(
        data,
        args.batch_size,
        args.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        pin=accelerator.device.type != "cpu",
    )
    unreadable = Unreadable(data)
    start = time.perf_counter()
    result = evaluate(model.to(accelerator.device), loader, accelerator, unreadable=unreadable)
    seconds = time.perf_counter() - start
    passed_over = unreadable.gather()
    report = {
        "checkpoint": model_file.source,
        "model": model_file.name,
        "data": where,
        "classes": len(data.class_names),
        "classes_with_pictures": len(data.class_names) - len(data.classes_without_pictures()),
        "input_size": list(preprocessing.input_size),
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "precision": model.facts.dtype if isinstance(model, ExportedModel) else distributed.precision(accelerator),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no NaN
        "images": result.images,
        "correct": result.correct,
        "unreadable": passed_over,
        "seconds": seconds,
        "images_per_second": result.images / seconds,
    }
    if accelerator.is_main_process:
        _report(report, args.json)
    return report


def _report(report: dict[str, Any], destination: str | None) -> None:
    text = json.dumps(report, indent=2)
    if destination == "-":
        print(text)
        return
    if destination is not None:
        with whole_file(Path(destination)) as path:
            path.write_text(text + "\n")
    loss = "not a number" if report["loss"] is None else f"{report['loss']:.4f}"
    skipped = f", {len(report['unreadable'])} unreadable left out" if report["unreadable"] else ""
    print(
        f"checkpoint  {report['checkpoint']}\n"
        f"model       {report['model']}\n"
        f"data        {report['data']}, pictures of {report['classes_with_pictures']} of {report['classes']} classes\n"
        f"input       {'x'.join(map(str, report['input_size']))}, crop {report['crop_pct']:g}, "
        f"{report['interpolation']}\n"
        f"device      {report['processes']} x {report['device']}, {report['precision']}\n"
        f"top-1       {report['top1']:.2f} %\n"
        f"top-5       {report['top5']:.2f} %\n"
        f"loss        {loss}\n"
        f"images      {report['images']} ({report['correct']} right{skipped})\n"
        f"speed       {report['images_per_second']:.0f} images/s"
    )


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    try:
        validate(build_parser().parse_args(argv))
    except InputError as error:
        message = str(error)
        for key, option in OPTIONS.items():
            message = message.replace(key, option)
        raise type(error)(message) from None
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
