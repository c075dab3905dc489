"""Evaluate a checkpoint: `python -m classification.validate CHECKPOINT --data-dir DIR`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvt_backbones import InputError
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.predict import open_model

from .checkpoint import write_atomically
from .data import PictureFolder, check_classes, eval_loader
from .engine import build_accelerator, evaluate


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m classification.validate",
        description="Top-1, top-5 and loss of a checkpoint on an ImageFolder. Files that the trainer wrote say how "
        "their pictures are prepared; for others that is the published way of the model.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file or URL in any layout, or a model's name")
    parser.add_argument("--data-dir", required=True, type=Path, help="folder of class folders, or the one above it")
    parser.add_argument("--split", default="val", help="folder under --data-dir to use, if there (default: val)")
    parser.add_argument("--model", metavar="NAME", help="model of a file that does not say it")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--workers", type=_count, default=2, metavar="N", help="decoding processes (default: 2)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="mixed precision")
    parser.add_argument("--size", type=_positive, metavar="N", help="side of the input instead of the model's own")
    parser.add_argument("--crop-pct", type=_share, metavar="X", help="share that is cropped instead of the model's")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear", "nearest"))
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON to FILE, or instead of the table"
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 100_000:
        raise ValueError
    return value


def _positive(text: str) -> int:
    value = _count(text)
    if value == 0:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= 1):
        raise ValueError
    return value


for _kind, _name in ((_count, "whole number"), (_positive, "positive whole number"), (_share, "share in (0, 1]")):
    _kind.__name__ = _name  # argparse says "invalid ... value"


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate as the parsed command line says; returns what `--json` writes."""
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json: the folder of {args.json} does not exist; make it first.")
    model_file = open_model(args.checkpoint, args.model)
    preprocessing = model_file.preprocessing
    channels = preprocessing.input_size[0]
    given = {
        "input_size": args.size and (channels, args.size, args.size),
        "crop_pct": args.crop_pct,
        "interpolation": args.interpolation,
    }
    preprocessing = replace(preprocessing, **{name: value for name, value in given.items() if value})
    folder = args.data_dir / args.split if (args.data_dir / args.split).is_dir() else args.data_dir
    data = PictureFolder(folder, channels=channels, transform=preprocessing.transform())
    if model_file.class_names is not None:
        check_classes(model_file.class_names, data.class_names, args.checkpoint, str(folder))
    elif model_file.num_classes != len(data.class_names):
        raise InputError(
            f"{args.checkpoint} tells {model_file.num_classes} classes apart, {folder} has {len(data.class_names)} "
            "class folders; give the data it was trained for."
        )
    accelerator = build_accelerator(args.device, args.amp)
    model = model_file.classifier().to(accelerator.device)
    loader = eval_loader(
        data,
        args.batch_size,
        args.workers,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        pin=accelerator.device.type != "cpu",
    )
    start = time.perf_counter()
    result = evaluate(model, loader, accelerator)
    seconds = time.perf_counter() - start
    report = {
        "checkpoint": str(args.checkpoint),
        "model": model_file.name,
        "data": str(folder),
        "input_size": list(preprocessing.input_size),
        "crop_pct": preprocessing.crop_pct,
        "interpolation": preprocessing.interpolation,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "images": result.images,
        "correct": result.correct1,
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
        try:
            write_atomically(Path(destination), lambda path: path.write_text(text + "\n"))
        except OSError as error:
            raise InputError(f"--json: cannot write {destination} ({error.strerror}); give another file.") from None
    print(
        f"checkpoint  {report['checkpoint']}\n"
        f"model       {report['model']}\n"
        f"data        {report['data']}\n"
        f"input       {'x'.join(map(str, report['input_size']))}, crop {report['crop_pct']:g}, "
        f"{report['interpolation']}\n"
        f"top-1       {report['top1']:.2f} %\n"
        f"top-5       {report['top5']:.2f} %\n"
        f"loss        {report['loss']:.4f}\n"
        f"images      {report['images']} ({report['correct']} right)\n"
        f"speed       {report['images_per_second']:.0f} images/s"
    )


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    validate(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
