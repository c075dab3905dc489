"""`hvt export`: a model as one graph for every size, in a file for another runtime, checked before it is there."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import whole_file
from .backbone import Backbone
from .classifier import Classifier
from .create import create_backbone, create_classifier
from .errors import InputError
from .exported import FACTS, ExportedModel, Facts, load_exported, needs
from .images import Reading, find_images
from .model_file import ModelFile, data_config, open_model
from .ops import any_size
from .predict import class_names, image_batches
from .variants import find_variant
from .weights.published import Preprocessing

SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2", "openvino": ".xml"}
MOST_BYTES = 2**31 - 2**20  # protobuf's limit for an ONNX file, less a graph
NEAR = {"float32": 1e-4, "float16": 2e-2}  # of the largest value: how far a file may be from its model
REMEDY = "nothing was written; try another --format, --torchscript or --static"
CALIBRATION = 128  # pictures, whose ranges are nearly those of thousands
AXES = {4: ("batch", "channels", "height", "width"), 5: ("batch", "channels", "frames", "height", "width")}


class Portable(nn.Module):
    """A model as it is exported: float32 in and out, whatever it computes in; what it returns as a tuple."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        if model.training or {p.dtype for p in model.parameters()} != {dtype}:
            model = copy.deepcopy(model).eval().to(dtype)  # the caller's stays as it is
        self.model, self.dtype = model, dtype
        self.eval()  # the former exporter brings all below back into the mode of the top

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self.model(images.to(self.dtype))
        return tuple(y.float() for y in ((found,) if isinstance(found, Tensor) else found))


def export_model(
    model: Classifier | Backbone,
    path: str | Path,
    name: str,
    *,
    format: str,
    preprocessing: Preprocessing | None = None,
    class_names: Sequence[str] | None = None,
    static: Sequence[int] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Write a model as a graph for batches and images of every size; see `export_graph`.

    Args:
        path: the file; its suffix is that of `SUFFIX`. OpenVINO's weights lie beside it in a .bin.
        name: of the model in `list_models()`.
        preprocessing: of its pictures, for the file's metadata; by default that of its published weights.
        class_names: for the metadata.
        static: (height, width), for clips (frames, height, width): the only size that the file takes.
        **options: `half`, `torchscript`, `calibration` of `export_graph`.
    """
    backbone, classes = (model.backbone, model.num_classes) if isinstance(model, Classifier) else (model, 0)
    if isinstance(model, Classifier) and not classes:
        raise InputError("the classifier has num_classes=0: export its backbone, or give it a head")
    facts = Facts(
        model=name,
        outputs=["logits"] if classes else [f"stage{index}" for index in backbone.out_indices],
        strides=[] if classes else list(backbone.strides),
        num_classes=classes,
        class_names=class_names,
        size=static,
        preprocessing=preprocessing or data_config(name, clips=True),
    )
    frames = [] if backbone.axes == 2 else [8]  # enough for more than one window
    return export_graph(
        model, path, facts, format=format, own=[*frames, *facts.preprocessing.input_size[1:]], **options
    )


def export_graph(
    model: nn.Module,
    path: str | Path,
    facts: Facts,
    *,
    format: str,
    own: Sequence[int],
    half: bool = False,
    torchscript: bool = False,
    calibration: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Write a graph of a model of images (B, C, H, W) or clips (B, C, T, H, W); nothing is written if its check fails.

    Args:
        model: returns a tensor, or several.
        facts: of the file, but for its `dtype`.
        format: "onnx", "torch-export", "aoti" (AOTInductor, for the device that the model is on), or "openvino".
        own: (height, width), for clips (frames, height, width), that the model is for; others are tried, too.
        half: compute in float16; inputs and outputs stay float32.
        torchscript: make ONNX by PyTorch's former exporter.
        calibration: batches of prepared pictures: weights and inputs of linear layers and convolutions become int8
            whose ranges are theirs ("onnx" and "openvino" alone).

    Returns:
        For each size that was tried, "224x224", the largest difference from the model as a share of its largest value.

    Raises:
        InputError: an argument that does not fit, a package or compiler that is missing, or a file that gives other
            values than the model.
    """
    path = Path(path)
    check_arguments(path, format, half=half, int8=len(calibration) > 0, torchscript=torchscript)
    check_static(facts.size, len(own))
    size = sum(p.numel() for p in model.parameters()) * (2 if half else 4)
    if size > MOST_BYTES and format in ("onnx", "openvino"):
        raise InputError(
            f"{facts.model} has {size / 2**30:.1f} GiB of weights, ONNX holds 2: add --half, or take torch-export"
        )
    facts = replace(facts, dtype="float16" if half else "int8" if calibration else "float32")
    plain = Portable(model, torch.float32)
    portable = Portable(model, torch.float16) if half else plain
    examples = _examples(plain, facts, own)
    with whole_file(path) as partial, torch.no_grad(), _quiet():
        beside = partial.with_suffix(".bin")
        try:
            try:
                _write(portable, examples[0], facts, partial, format, torchscript, calibration)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # each exporter has its own
                raise InputError(f"{facts.model}: {format} makes no graph ({error}): {REMEDY}") from error
            errors = _check(load_exported(partial), plain, examples, facts)
            if beside.exists():
                os.replace(beside, path.with_suffix(".bin"))
        finally:
            beside.unlink(missing_ok=True)
    return errors


def check_arguments(path: Path, format: str, *, half: bool, int8: bool, torchscript: bool) -> None:
    """What can be said before there is a model.

    Raises:
        InputError: see `export_graph`.
    """
    if path.suffix != SUFFIX[format]:
        raise InputError(f"--output {path}: a file of {format} ends in {SUFFIX[format]}")
    if half and int8:
        raise InputError("--half contradicts --int8: choose one of them")
    through_onnx = format in ("onnx", "openvino")
    for wanted, option in ((int8, "--int8"), (torchscript, "--torchscript")):
        if wanted and not through_onnx:
            raise InputError(f"{option} is for --format onnx and openvino, not {format}: leave it out")
    for package in ("onnx", "onnxscript", "onnxruntime") if through_onnx else ():
        needs(package, f"--format {format}")
    if format == "openvino":
        needs("openvino", "--format openvino")
    if format == "aoti":
        _check_compiler()


def check_static(size: Sequence[int] | None, axes: int) -> None:
    """
    Raises:
        InputError: another number of sides than a model of so many axes takes.
    """
    if size is not None and len(size) != axes:
        raise InputError(f"--static takes {' '.join(AXES[axes + 2][2:])}, got {len(size)} numbers")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError("--format aoti compiles C++: install g++, or name a compiler in CXX") from None


def _examples(model: Portable, facts: Facts, own: Sequence[int]) -> list[Tensor]:
    """What the graph is made with, and what it is checked with: batches of the model's own size and of odd ones."""
    if facts.size is not None:
        sizes = [(2, *facts.size), (1, *facts.size)]
    else:
        sizes = [(2, *(side + 9 + 4 * axis for axis, side in enumerate(own))), (1, *own)]
        sizes.append((1, *(side * 5 // 7 + axis + 1 for axis, side in enumerate(own))))
    channels, device = facts.preprocessing.input_size[0], next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, *size, generator=generator).to(device) for batch, *size in sizes]


def _axis_names(images: Tensor, static: Sequence[int] | None) -> dict[int, str]:
    """Of the axes of any length."""
    names = AXES[images.dim()]
    return {axis: names[axis] for axis in (0, *range(2, images.dim())) if axis == 0 or static is None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell users of their own parts; what matters here is whether the file is right, which is checked."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)


def _write(
    model: Portable,
    example: Tensor,
    facts: Facts,
    path: Path,
    format: str,
    torchscript: bool,
    calibration: Sequence[Tensor],
) -> None:
    axes = _axis_names(example, facts.size)
    if format in ("torch-export", "aoti"):
        shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),)
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        if format == "torch-export":
            torch.export.save(program, path, extra_files={FACTS: json.dumps(facts.to_metadata())})
            return
        settings = {"aot_inductor.metadata": facts.to_metadata()}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
        return
    if format == "onnx":
        _write_onnx(model, example, facts, path, axes, torchscript, calibration)
        return
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "model.onnx"
        _write_onnx(model, example, facts, onnx_file, axes, torchscript, calibration)
        graph = openvino.convert_model(onnx_file)
        for key, text in facts.to_metadata().items():
            graph.set_rt_info(text, key.split("."))
        openvino.save_model(graph, path, compress_to_fp16=facts.dtype == "float16")


def _write_onnx(
    model: Portable,
    example: Tensor,
    facts: Facts,
    path: Path,
    axes: dict[int, str],
    torchscript: bool,
    calibration: Sequence[Tensor],
) -> None:
    import onnx

    names: dict[str, Any] = {
        "input_names": ["images" if example.dim() == 4 else "clips"],
        "output_names": list(facts.outputs),
        "external_data": False,
        "verbose": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        if torchscript:
            dynamic = {names["input_names"][0]: axes}
            with any_size() if len(axes) > 1 else contextlib.nullcontext():
                torch.onnx.export(model, (example,), plain, dynamo=False, dynamic_axes=dynamic, **names)
        else:
            torch.onnx.export(model, (example,), plain, dynamo=True, dynamic_shapes=(axes,), **names)
        if calibration:
            quantise(plain, quantised, names["input_names"][0], calibration)
        graph = onnx.load(quantised if calibration else plain)
    for part in (*graph.graph.node, *graph.graph.value_info):
        part.ClearField("metadata_props")  # PyTorch's: lines of its source, with this machine's paths
    onnx.helper.set_model_props(graph, facts.to_metadata())
    onnx.save(graph, path)


def quantise(plain: Path, quantised: Path, name: str, calibration: Sequence[Tensor]) -> None:
    """Linear layers and convolutions of an ONNX file in 8 bits, of the ranges that batches of its input `name` have."""
    from onnxruntime import quantization

    class Batches(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.cpu().numpy()}

    quantization.quantize_static(
        plain,
        quantised,
        Batches(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        per_channel=True,
        reduce_range=True,  # 7 bits: sums of 8 overflow silently on CPUs without VNNI
        extra_options={
            "MatMulConstBOnly": True,  # attention's own products stay in float32
            "ActivationSymmetric": True,  # OpenVINO refuses Swin's products with zero points
        },
    )


def _check(exported: ExportedModel, model: Portable, examples: Sequence[Tensor], facts: Facts) -> dict[str, float]:
    """
    Raises:
        InputError: the file gives other values, or refuses a size.
    """
    exported.to(examples[0].device)
    errors: dict[str, float] = {}
    for images in examples:
        size = "x".join(map(str, images.shape[2:]))
        expected = model(images)
        try:
            found = exported(images)
        except Exception as failure:  # each runtime has its own
            raise InputError(f"{facts.model}: the exported graph fails at {size} ({failure}): {REMEDY}") from None
        pairs = zip(found if isinstance(found, tuple) else (found,), expected, strict=True)
        error = max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
        if not error <= NEAR.get(facts.dtype, 1.0):  # nor NaN
            raise InputError(
                f"{facts.model}: the exported graph is off by {error:.1g} of the largest value at {size}: {REMEDY}"
            )
        errors[size] = max(error, errors.get(size, 0.0))
    return errors


def run(args: argparse.Namespace) -> int:
    """`hvt export`."""
    from .device import select_device

    int8 = args.int8
    check_arguments(args.output, args.format, half=args.half, int8=int8, torchscript=args.torchscript)
    if int8 != (args.calibrate is not None):
        raise InputError("--int8 needs --calibrate DIR, and the other way round: give both or neither")
    if args.stages and not args.maps:
        raise InputError("--stages is for --maps: add that")
    pictures = find_images([args.calibrate]) if int8 else []
    if args.format != "aoti" and args.device not in ("auto", "cpu"):
        raise InputError(f"--device {args.device} is for --format aoti: other files are for every device, leave it out")
    device = select_device(args.device if args.format == "aoti" else "cpu")
    model, name, preprocessing, names = _model(args)
    clips = find_variant(name)[0].frames is not None
    check_static(args.static, 3 if clips else 2)
    if int8 and clips:
        raise InputError(f"--int8 is calibrated with pictures, and {name} takes clips: leave it out")
    if args.static:
        preprocessing = replace(preprocessing, input_size=(preprocessing.input_size[0], *args.static[-2:]))
    reading = Reading[Path]()
    step = -(-len(pictures) // CALIBRATION)
    calibration = list(image_batches(pictures[:: step or 1], preprocessing, device, reading=reading)) if int8 else []
    if int8 and not calibration:
        raise InputError(f"--calibrate {args.calibrate}: none of its pictures can be read")
    errors = export_model(
        model.to(device),
        args.output,
        name,
        format=args.format,
        preprocessing=preprocessing,
        class_names=names,
        static=args.static,
        half=args.half,
        torchscript=args.torchscript,
        calibration=calibration,
    )
    report(args.output, errors)
    return reading.status()


def report(path: Path, errors: dict[str, float]) -> None:
    """Print what `export_graph` returned, and the file."""
    checked = ", ".join(f"{size} ({error:.1g})" for size, error in errors.items())
    print(f"checked against the model, largest difference as a share of the largest value: {checked}")
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")


def _model(
    args: argparse.Namespace,
) -> tuple[Classifier | Backbone, str, Preprocessing, Sequence[str] | None]:
    """The model to export, its name, the preprocessing of its pictures, and its classes' names."""
    stages: dict[str, Any] = {"out_indices": tuple(args.stages)} if args.stages else {}
    if args.random_weights:
        variant = find_variant(args.source)[0]
        model = create_backbone(args.source, **stages) if args.maps else create_classifier(args.source)
        return model.eval(), variant.name, data_config(variant.name, clips=True), None
    opened: ModelFile = open_model(args.source, args.model, args.weights_key, clips=True)
    if args.maps or not opened.num_classes:
        return opened.backbone(**stages), opened.name, opened.preprocessing, None
    names = opened.class_names or class_names(opened.num_classes)
    return opened.classifier(), opened.name, opened.preprocessing, names
