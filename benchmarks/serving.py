"""Which way to serve a classifier on a CPU: eager, compiled, and exported to other runtimes; ours beside timm's.

    python -m benchmarks.serving --out benchmarks/results/serving_cpu.json
    python -m benchmarks.serving --models swin_tiny --routes eager onnx openvino --threads 1 --clock process

A competitor is a library's model, with the same weights, by one route. Each is first seen to give the logits of timm's
eager model: within 1e-4 of the largest value in float32, 5e-2 in bfloat16; what int8 is off by is reported. All take
one size, the model's own, as `hvt export --static` makes it. Ratios are to timm's faster eager model. `swin_tiny_maps`
are those of a detector's backbone at 800x1216, beside mmdet's.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from hvt_backbones.errors import InputError, exit_on_input_error
from hvt_backbones.export import quantise
from hvt_backbones.exported import openvino_core

from . import dense, measure
from .comparison import Row, Settings, command_line, compare_all, parse
from .competitors import dry_run, outputs
from .peers import MODELS, build_competitors, count_flops

MAPS = "swin_tiny_maps"  # of a detector's backbone
MODEL_OF_MAPS, MAP_SIZE = "swin_tiny", (800, 1216)
NEAR = {"bf16": 5e-2, "int8": 1.0}  # of the largest value; in float32 1e-4
Call = Callable[[Tensor], Tensor]


def eager(model: nn.Module, images: Tensor, folder: Path) -> Call:
    return torch.inference_mode()(model)


def eager_bf16(model: nn.Module, images: Tensor, folder: Path) -> Call:
    model = copy.deepcopy(model).bfloat16()
    return torch.inference_mode()(lambda x: model(x.bfloat16()).float())


def compiled(model: nn.Module, images: Tensor, folder: Path) -> Call:
    return torch.no_grad()(torch.compile(copy.deepcopy(model), dynamic=False))


def compiled_dynamic(model: nn.Module, images: Tensor, folder: Path) -> Call:
    """With freezing, which packs weights for oneDNN."""
    options = {"freezing": True}
    return torch.no_grad()(torch.compile(copy.deepcopy(model), dynamic=True, options=options))


def aoti(model: nn.Module, images: Tensor, folder: Path) -> Call:
    path = str(folder / "model.pt2")
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"freezing": True})
        return torch._inductor.aoti_load_package(path)


def to_onnx(model: nn.Module, images: Tensor, folder: Path, *, int8: bool) -> Path:
    """The file of a model, made once for all routes of a row."""
    plain, quantised = folder / "plain.onnx", folder / "int8.onnx"
    if not plain.exists():
        names: dict[str, Any] = {"input_names": ["images"], "external_data": False, "verbose": False}
        with torch.no_grad():
            torch.onnx.export(model, (images,), plain, dynamo=True, **names)
    if int8 and not quantised.exists():
        quantise(plain, quantised, "images", [torch.randn_like(images) for _ in range(4)])
    return quantised if int8 else plain


def onnx(model: nn.Module, images: Tensor, folder: Path, *, int8: bool = False) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = to_onnx(model, images, folder, int8=int8)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def onnx_int8(model: nn.Module, images: Tensor, folder: Path) -> Call:
    return onnx(model, images, folder, int8=True)


def by_openvino(model: nn.Module, images: Tensor, folder: Path, *, int8: bool = False, precision: str = "f32") -> Call:
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    graph = openvino_core().read_model(to_onnx(model, images, folder, int8=int8))
    compiled = openvino_core().compile_model(graph, "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def openvino_bf16(model: nn.Module, images: Tensor, folder: Path) -> Call:
    return by_openvino(model, images, folder, precision="bf16")


def openvino_int8(model: nn.Module, images: Tensor, folder: Path) -> Call:
    return by_openvino(model, images, folder, int8=True)


ROUTES: dict[str, Callable[[nn.Module, Tensor, Path], Call]] = {
    "eager": eager,
    "compile": compiled,
    "compile-dynamic": compiled_dynamic,
    "aoti": aoti,
    "onnx": onnx,
    "openvino": by_openvino,
    "eager-bf16": eager_bf16,
    "openvino-bf16": openvino_bf16,
    "onnx-int8": onnx_int8,
    "openvino-int8": openvino_int8,
}


class Flat(nn.Module):
    """A backbone whose maps are one row of numbers."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in outputs(self.backbone, images)])


def measure_model(name: str, size: None, settings: Settings) -> Iterator[Row]:
    """Of a classifier a row per batch; of maps as detectors take them, beside mmdet's, one."""
    torch.manual_seed(0)
    if name == MAPS:
        built, _ = dense.build_competitors(MODEL_OF_MAPS, MAP_SIZE)
        flops = dry_run(built["hvt"], MAP_SIZE)[0]
        libraries = {key: Flat(built[key]).eval() for key in ("hvt", "mmdet") if key in built}
        if "mmdet" not in libraries:
            raise InputError(
                f"{MAPS} is compared with mmdet, which is not installed: `make install-all`, or leave it out"
            )
        yield measure_routes(name, libraries, "mmdet", torch.randn(1, 3, *MAP_SIZE), flops, settings)
        return
    side = MODELS[name].image_size
    flops = count_flops(name, side)["inference"]
    libraries = {key: model.eval() for key, model in build_competitors(name).items() if key != "torchvision"}
    for batch in settings.options.batches:
        yield measure_routes(name, libraries, "timm", torch.randn(batch, 3, side, side), flops * batch, settings)


def measure_routes(
    name: str, libraries: Mapping[str, nn.Module], peer: str, images: Tensor, flops: int, settings: Settings
) -> Row:
    """All routes of ours and the peer's, interleaved; of its other forms, `PEER-...`, eager mode."""
    with torch.inference_mode():
        expected = libraries[peer](images)
    batch, mode = len(images), f"batch {len(images)}"
    calls: dict[str, measure.Work] = {}
    errors: dict[str, float] = {}
    failed: list[str] = []
    for library, model in libraries.items():
        routes = settings.options.routes if library in ("hvt", peer) else ["eager"]
        with tempfile.TemporaryDirectory() as folder:
            for route in routes:
                torch.compiler.reset()
                key = f"{library} {route}"
                try:
                    call = ROUTES[route](model, images, Path(folder))
                    errors[key] = float((call(images) - expected).abs().max() / expected.abs().max())
                except Exception as error:  # of a runtime: the other routes are wanted too
                    failed.append(f"{key}: {' '.join(str(error).split())[:200]}")
                    continue
                if not errors[key] < NEAR.get(route.rpartition("-")[2], 1e-4):
                    raise AssertionError(f"{key} is off by {errors[key]:.1g}, so its time means nothing")
                calls[key] = partial(call, images)
                print(f"{name} {mode} {key}: made", file=sys.stderr)
    samples = measure.interleave(calls, settings.clock, rounds=settings.options.rounds)
    best, figures = measure.compare(
        samples, {}, [key for key in samples if key.startswith(peer) and key.endswith("eager")], "peer"
    )
    for key, entry in figures.items():
        entry["images_per_s"] = batch / entry["median_s"]
        entry["error_to_peer"] = errors[key]
        same = f"{peer} {key.partition(' ')[2]}"
        if same in samples:
            entry["ratio_to_same_route"] = measure.paired_ratio(samples[key], samples[same])[1]
    return {
        "model": name,
        "mode": mode,
        "image_size": list(images.shape[2:]),
        "batch": batch,
        "flops": flops,
        "peer_best": best,
        "competitors": figures,
        "failed": failed,
    }


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(
        "serving", "Compare ways to serve a model on a CPU.", [*MODELS, MAPS], ["serve"], batch=1, rounds=9
    )
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4], metavar="N", help="default: 1 4")
    options = parse(parser, argv, [*MODELS, MAPS])
    options.routes = list(dict.fromkeys(["eager", *options.routes]))
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    logging.disable(logging.WARNING)  # exporters' and quantisers' advice
    return compare_all("serving", "peer", read_options(argv), argv, measure_model)


if __name__ == "__main__":
    raise SystemExit(main())
