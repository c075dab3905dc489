"""The command `hvt`: one function for each of its commands, which import what they need when they run."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .errors import ArgumentParser, InputError, exit_on_input_error, whole_number, whole_numbers
from .images import Reading, find_images, silence_false_alarms
from .variants import VARIANTS, Variant, find_variant, list_models
from .version import __version__


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="hvt", description="Hierarchical vision-transformer backbones.")
    parser.add_argument("--version", action="version", version=f"hvt_backbones {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    models = commands.add_parser("models", help="list the models", description="List the models.")
    models.add_argument("pattern", nargs="?", metavar="PATTERN", help="names that match, such as 'swin_*'")
    models.add_argument("--family", choices=sorted({variant.family for variant in VARIANTS.values()}))
    form = models.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON, with constructor arguments and aliases")
    models.set_defaults(run=run_models)

    predict = commands.add_parser(
        "predict", help="name what pictures show", description="Print the most probable classes of pictures."
    )
    _add_model_and_images(predict)
    predict.add_argument(
        "--top-k", type=whole_number(1), default=5, metavar="K", help="classes per picture (default 5)"
    )
    predict.add_argument("--json", action="store_true", help="print JSON")
    predict.set_defaults(run=run_predict)

    features = commands.add_parser(
        "features", help="write feature maps of pictures", description="Write the feature maps of pictures to a file."
    )
    _add_model_and_images(features)
    features.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .safetensors or .npz file")
    features.add_argument("--stages", type=int, nargs="+", metavar="I", help="stages from 0 (default: all)")
    features.add_argument(
        "--size",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help="HEIGHT WIDTH, or one side: resize whole pictures to it instead of cropping them as for classification",
    )
    features.add_argument("--random-weights", action="store_true", help="download nothing: the shapes are what counts")
    features.set_defaults(run=run_features)

    reconstruct = commands.add_parser(
        "reconstruct",
        help="draw what SimMIM paints of pictures",
        description="Hide squares of pictures and draw what a model of SimMIM's pre-training paints there.",
    )
    _add_model_and_images(reconstruct)
    reconstruct.add_argument("--output", required=True, type=Path, metavar="FILE", help="a .png file")
    reconstruct.add_argument("--mask-ratio", type=float, metavar="X", help="share that is hidden (default: as trained)")
    reconstruct.add_argument("--seed", type=whole_number(), default=0, metavar="N", help="of the masks (default 0)")
    reconstruct.set_defaults(run=run_reconstruct)

    diagnose = commands.add_parser(
        "diagnose",
        help="show how signals and gradients fare from block to block",
        description="Write feature variance, attention entropy, largest logit and gradient norm of each block.",
    )
    _add_model(diagnose)
    Reading.add_argument(diagnose)
    diagnose.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder of pictures")
    diagnose.add_argument(
        "--output",
        type=Path,
        default=Path("diagnosis.png"),
        metavar="PNG",
        help="the picture, with the figures in a .json beside it (default diagnosis.png)",
    )
    diagnose.add_argument(
        "--pictures", type=whole_number(1), default=64, metavar="N", help="at most, from all over DIR (default 64)"
    )
    diagnose.add_argument(
        "--batch", type=whole_number(1), default=16, metavar="N", help="pictures at a time (default 16)"
    )
    diagnose.set_defaults(run=run_diagnose)

    transfer = commands.add_parser(
        "transfer-report",
        help="accuracy in other windows, without fine-tuning",
        description="Top-1 of a Swin or SwinV2 classifier in each window; the images grow with the window.",
    )
    _add_model(transfer)
    transfer.add_argument(
        "--windows", required=True, type=whole_numbers, metavar="W,W", help="sides of windows: 8,12,16,24"
    )
    transfer.add_argument(
        "--data", required=True, type=Path, metavar="DIR", help="a folder with a sub-folder of pictures per class"
    )
    transfer.add_argument("--output", type=Path, metavar="FOLDER", help="for transfer.json and the plot transfer.png")
    transfer.set_defaults(run=run_transfer_report)

    convert = commands.add_parser(
        "convert", help="rewrite a checkpoint in another layout", description="Rewrite a checkpoint in another layout."
    )
    convert.add_argument("input", type=Path, metavar="IN", help="checkpoint file")
    convert.add_argument("output", type=Path, metavar="OUT", help="file to write: .safetensors, .pth, .pt or .bin")
    convert.add_argument("--to", required=True, metavar="LAYOUT", help="layout of OUT: hvt, official, timm, mmdet, ...")
    convert.add_argument("--layout", default="auto", metavar="LAYOUT", help="layout of IN (default: told by its keys)")
    convert.add_argument("--model", metavar="NAME", help="check that the weights are of this model, and say so in OUT")
    convert.add_argument(
        "--backbone-only", action="store_true", help="leave out a detector's or segmentor's neck, heads and so on"
    )
    _add_weights_key(convert)
    convert.set_defaults(run=run_convert)

    export = commands.add_parser(
        "export",
        help="write a model for another runtime",
        description="Write a model as one graph for batches and images of every size, checked against the model.",
    )
    _add_export_options(export)
    export.set_defaults(run=run_export)

    plan = commands.add_parser(
        "plan",
        help="say how a model fits the memory of devices",
        description="Say what memory a training step takes on each device, and the cheapest way that fits.",
    )
    _add_plan_options(plan)
    plan.set_defaults(run=run_plan)

    doctor = commands.add_parser(
        "doctor", help="say what is installed and what is missing", description="Say what is installed and missing."
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--npu", action="store_true", help="warn of all that an Ascend NPU lacks here")
    doctor.set_defaults(run=run_doctor)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="MODEL_OR_CKPT",
        help="a model's name, for its pretrained weights (swin_tiny, swin_base.in22k), or a checkpoint file",
    )
    parser.add_argument("--model", metavar="NAME", help="the model of a checkpoint that does not say it")
    _add_weights_key(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, npu, cuda:1 (default auto)")


def _add_model_and_images(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    Reading.add_argument(parser)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    number = whole_number(1)
    parser.add_argument("model", metavar="MODEL", help="a model's name")
    parser.add_argument(
        "--image-size", type=number, nargs="+", required=True, metavar="N", help="HEIGHT WIDTH, or one side"
    )
    parser.add_argument("--frames", type=number, metavar="N", help="of a clip (default: the model's)")
    parser.add_argument("--batch", type=number, required=True, metavar="N", help="images or clips on each device")
    parser.add_argument("--window-size", type=number, metavar="N", help="tokens along a side (default: the model's)")
    parser.add_argument(
        "--max-logits",
        type=number,
        metavar="N",
        help="attention part by part, of so many logits (default: all at once)",
    )
    parser.add_argument("--devices", type=number, required=True, metavar="N", help="devices that train together")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="of each device: 40GiB, 80GB")
    parser.add_argument(
        "--strategy",
        nargs="+",
        default=[],
        metavar="S",
        help="ddp, zero1, zero2, fsdp2, zero3 or fsdp2-offload, alone or with what is recomputed: +mlp, +attention, "
        "+block, +stage "
        "(default: each alone and with +block)",
    )
    parser.add_argument(
        "--task", choices=("classification", "simmim", "detection", "video"), help="default: as the model takes"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16, on the CPU fp32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="kind of devices (default cuda)")


def add_graph_options(parser: argparse.ArgumentParser) -> None:
    """What every command that exports takes."""
    formats = ("onnx", "torch-export", "aoti", "openvino")
    parser.add_argument("--format", required=True, choices=formats, help="of the file")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="ends in .onnx, .pt2 (torch-export, aoti) or .xml"
    )
    parser.add_argument(
        "--static",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help="HEIGHT WIDTH, of clips FRAMES HEIGHT WIDTH: for this size alone (default: any)",
    )
    parser.add_argument("--half", action="store_true", help="compute in float16")
    parser.add_argument("--torchscript", action="store_true", help="make ONNX by PyTorch's former exporter")


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add_graph_options(parser)
    parser.add_argument("--maps", action="store_true", help="the stages' maps (default: classes, if there is a head)")
    parser.add_argument("--stages", type=int, nargs="+", metavar="I", help="with --maps: stages from 0 (default: all)")
    parser.add_argument("--int8", action="store_true", help="8-bit linear layers and convolutions")
    parser.add_argument("--calibrate", type=Path, metavar="DIR", help="with --int8: pictures such as will come")
    parser.add_argument("--random-weights", action="store_true", help="download nothing: the shapes are what counts")


def _add_weights_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights-key", metavar="KEY", help="which of several sets of weights in the checkpoint (state_dict_ema)"
    )


def run_models(args: argparse.Namespace) -> None:
    variants = [VARIANTS[name] for name in list_models(args.pattern)]
    variants = [variant for variant in variants if args.family in (None, variant.family)]
    if not variants:
        of_family = f" of the family {args.family}" if args.family else ""
        raise InputError(f"no model{of_family} matches {args.pattern!r}: try '*{args.pattern}*', or `hvt models`")
    if args.json:
        data = [{**asdict(variant), "aliases": list(variant.aliases)} for variant in variants]
        print(json.dumps(data, indent=2))
        return
    header = ("model", "input", "params (M)", "FLOPs (G)", "top-1 (%)", "weights")
    rows = [_as_row(variant) for variant in variants]
    if args.markdown:
        lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---", *["---:"] * 4, "---"), *rows)]
    else:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if 1 <= i <= 4 else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in (header, *rows)
        ]
    print("\n".join(lines))


def _as_row(variant: Variant) -> tuple[str, ...]:
    """Published figures; top-1 is of the first weights that have one."""
    figures = [variant.params_m, variant.flops_g, next(iter(variant.top1.values()), None)]
    cells = ("-" if figure is None else str(figure) for figure in figures)
    size = str(variant.input_size) if variant.frames is None else f"{variant.frames}x{variant.input_size}"
    return variant.name, size, *cells, ", ".join(variant.weights)


def run_predict(args: argparse.Namespace) -> int:
    from . import predict
    from .device import select_device
    from .exported import open_runnable
    from .model_file import image_variant

    silence_false_alarms()
    images, reading = find_images(args.images), Reading[Path](args.on_error)
    device = select_device(args.device)
    opened = open_runnable(args.source, args.model, args.weights_key)
    image_variant(opened.name)
    model = opened.classifier().to(device)
    batches = predict.image_batches(images, opened.preprocessing, device, reading=reading)
    probabilities = predict.predict(model, batches)
    names = opened.class_names or predict.class_names(opened.num_classes)
    top = probabilities.topk(min(args.top_k, opened.num_classes))
    results: list[dict[str, Any]] = []
    for image, values, indices in zip(reading.done, top.values.tolist(), top.indices.tolist(), strict=True):
        guesses = [
            {"class": index, "name": names[index] if names else f"class {index}", "probability": value}
            for index, value in zip(indices, values, strict=True)
        ]
        results.append({"image": str(image), "top": guesses})
    if args.json:
        print(json.dumps({"model": opened.name, "weights": opened.source, "predictions": results}, indent=2))
        return reading.status()
    for result in results:
        print(result["image"])
        for guess in result["top"]:
            print(f"  {100 * guess['probability']:5.1f} %  {guess['name']}")
    return reading.status()


def run_features(args: argparse.Namespace) -> int:
    from . import predict
    from .create import create_backbone
    from .device import select_device
    from .exported import open_runnable
    from .model_file import data_config, image_variant

    silence_false_alarms()
    if args.output.suffix not in (".safetensors", ".npz"):
        raise InputError(f"--output {args.output}: end the name in .safetensors or .npz")
    _check_writable(args.output)
    if args.size and len(args.size) > 2:
        raise InputError(f"--size takes HEIGHT WIDTH or one side, got {len(args.size)} numbers")
    images, reading = find_images(args.images), Reading[Path](args.on_error)
    device = select_device(args.device)
    stages: dict[str, Any] = {"out_indices": tuple(args.stages)} if args.stages else {}
    if args.random_weights:
        _check_random_weights(args.source)
        preprocessing = data_config(args.source)
        backbone: Any = create_backbone(args.source, **stages).eval()
    else:
        opened = open_runnable(args.source, args.model, args.weights_key)
        image_variant(opened.name)
        backbone, preprocessing = opened.backbone(**stages), opened.preprocessing
    if args.size:
        height, width = args.size if len(args.size) == 2 else args.size * 2
        preprocessing = replace(
            preprocessing, input_size=(preprocessing.input_size[0], height, width), crop_pct=1.0, crop_mode="squash"
        )
    batches = predict.image_batches(images, preprocessing, device, reading=reading)
    maps = predict.features(backbone.to(device), batches)
    if not maps:
        return reading.status()
    predict.write_features(args.output, maps, reading.done)
    for (name, stage), stride in zip(maps.items(), backbone.strides, strict=True):
        print(f"{name}  stride {stride:2}  {tuple(stage.shape)}")
    count = len(reading.done)
    print(f"wrote {args.output}: {count} picture{'s' if count > 1 else ''}, (N, C, H, W) per stage")
    return reading.status()


def run_reconstruct(args: argparse.Namespace) -> int:
    from . import predict
    from .device import select_device
    from .model_file import open_model
    from .reconstruct import reconstruct, write_sheet

    silence_false_alarms()
    if args.output.suffix != ".png":
        raise InputError(f"--output {args.output}: end the name in .png")
    _check_writable(args.output)
    images, reading = find_images(args.images), Reading[Path](args.on_error)
    device = select_device(args.device)
    opened = open_model(args.source, args.model, args.weights_key)
    model, preprocessing, masking = opened.simmim().to(device), opened.preprocessing, opened.masking
    if args.mask_ratio is not None:
        masking = replace(masking, ratio=args.mask_ratio)
    batches = list(predict.image_batches(images, preprocessing, device, reading=reading))
    if batches:
        pictures, mask, painted = reconstruct(model, batches, masking, args.seed)
        write_sheet(args.output, model, pictures, mask, painted, preprocessing)
        loss = model.loss(pictures, painted, mask)
        rows = f"{len(pictures)} row{'s' if len(pictures) > 1 else ''}"
        print(f"wrote {args.output}: {rows}, picture, what is seen, what is painted; loss {loss:.4f}")
    return reading.status()


def run_diagnose(args: argparse.Namespace) -> int:
    from . import diagnose
    from .device import select_device
    from .model_file import image_variant, open_model
    from .plots import check_matplotlib

    silence_false_alarms()
    if args.output.suffix != ".png":
        raise InputError(f"--output {args.output}: end the name in .png")
    for path in (args.output, args.output.with_suffix(".json")):
        _check_writable(path)
    check_matplotlib()
    if not args.data.is_dir():
        raise InputError(f"--data {args.data} is no folder: give one with pictures in it")
    images, reading = find_images([args.data]), Reading[Path](args.on_error)
    device = select_device(args.device)
    opened = open_model(args.source, args.model, args.weights_key)
    image_variant(opened.name)
    blocks, facts = diagnose.diagnose_pictures(
        opened, images, args.data, device, most=args.pictures, batch_size=args.batch, reading=reading
    )
    if not blocks:
        return reading.status()
    diagnose.write_report(args.output, blocks, facts)
    print(diagnose.table(blocks))
    count = facts["pictures"]
    print(f"{count} picture{'s' if count > 1 else ''}; {diagnose.GRADIENTS[facts['classes']]}")
    print(f"wrote {args.output} and {args.output.with_suffix('.json')}")
    return reading.status()


def run_transfer_report(args: argparse.Namespace) -> None:
    from . import transfer
    from .device import select_device
    from .model_file import open_model
    from .plots import check_matplotlib

    silence_false_alarms()
    if args.output is not None:
        _check_writable(args.output / "transfer.json")
        check_matplotlib()
    device = select_device(args.device)
    opened = open_model(args.source, args.model, args.weights_key)
    models = transfer.in_windows(opened, args.windows)
    paths, targets = transfer.labelled_pictures(args.data, opened)
    found: list[transfer.Transfer] = []
    for one in transfer.transfer(models, paths, targets, device):
        if not found:
            print(f"{opened.name}, {len(paths)} pictures of {args.data}\n{transfer.row()}")
        print(transfer.row(one), flush=True)
        found.append(one)
    if args.output is not None:
        transfer.write_report(args.output, opened, args.data, found, len(paths))
        print(f"wrote {args.output / 'transfer.json'} and {args.output / 'transfer.png'}")


def run_convert(args: argparse.Namespace) -> None:
    from .model_file import describe_weights, kept_metadata, read_described, record_windows, recorded_arguments
    from .swin import windows_per_stage
    from .weights.convert import write_checkpoint
    from .weights.files import read_weights, save_state_dict
    from .weights.inflate import inflate_checkpoint

    _check_writable(args.output)
    weights = read_weights(args.input, args.weights_key)
    if args.output.exists() and args.output.samefile(args.input):
        raise InputError(f"{args.output} is the input itself: give another name")
    variant = find_variant(args.model)[0] if args.model else None
    metadata: dict[str, Any] = kept_metadata(weights.metadata, variant.name if variant else None)
    named = not any(key.endswith("relative_coords_table") for key in weights.tensors)  # which tell the window
    arch = recorded_arguments(args.input, metadata, named=named)
    checkpoint = read_described(args.input, weights.tensors, metadata, args.layout)
    found = checkpoint.layout
    if variant is not None:
        opened = describe_weights(str(args.input), checkpoint, weights.metadata, args.model)
        metadata = record_windows(metadata, opened.classifier().backbone if opened.num_classes else opened.backbone())
        if (found.family, variant.family) == ("swin", "video_swin"):
            checkpoint = inflate_checkpoint(checkpoint, windows_per_stage(arch["window_size"], checkpoint.stages, 3))
    windows = arch.get("window_size"), arch.get("pretrained_window_size", 0)
    converted = write_checkpoint(checkpoint, args.to, *windows, whole=not args.backbone_only)
    if classes := weights.classes:
        metadata["dataset_meta"] = classes  # by which MMEngine's tools know them
    save_state_dict(converted, args.output, metadata)
    numbers = sum(tensor.numel() for tensor in converted.values()) / 1e6
    place = "at its top" if weights.key is None else f"under {weights.key!r}"
    under = f" {place}, not {', '.join(weights.others)}" if weights.others else ""
    print(f"{args.input}: {found.name} layout of {found.family}, {len(weights.tensors)} tensors{under}")
    print(f"{args.output}: {args.to} layout, {len(converted)} tensors, {numbers:.1f} M numbers")


def run_export(args: argparse.Namespace) -> int:
    from . import export

    silence_false_alarms()
    _check_writable(args.output)
    if args.random_weights:
        _check_random_weights(args.source)
    return export.run(args)


def run_plan(args: argparse.Namespace) -> None:
    from . import plan

    plan.run(args)


def run_doctor(args: argparse.Namespace) -> None:
    from . import doctor

    findings = doctor.examine(npu=args.npu)
    print(json.dumps(findings, indent=2) if args.json else doctor.report(findings))


def _check_random_weights(source: str) -> None:
    from .weights.sources import is_file_or_url

    if is_file_or_url(source):
        raise InputError(f"--random-weights is for a model's name, and {source} is a file: leave it out")


def _check_writable(path: Path) -> None:
    """Before the work, so that it is not lost at the end. Missing folders are made when the file is written."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    existing = path if path.exists() else next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(existing, os.W_OK) or (existing is not path and not existing.is_dir()):
        raise InputError(f"{path} cannot be written, {existing} does not allow it: choose another folder")


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int | None:
    args = build_parser().parse_args(argv)
    return args.run(args)
