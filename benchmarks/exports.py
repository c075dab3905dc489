"""What ours, timm, torchvision and transformers export for images of every size, tried in one run.

    python -m benchmarks.exports --routes torch.export onnx openvino torchscript > benchmarks/results/exports.txt
    python -m benchmarks.exports --routes torch.compile --libraries hvt timm > benchmarks/results/traces.txt

Small models of each library, with random weights, are exported once with dynamic batch, height and width from an image
of 232x172, and run on six sizes they were not exported with. A cell counts the sizes at which the result is within 1e-4
of the largest value of what the model itself gives in eager mode; sizes that eager mode refuses are left out, in
brackets. A graph that takes more than three minutes of the processor is none. `torch.compile` is one for dynamic sizes,
of which the table has the seconds of the processor until the six sizes are traced, without a compiler, and the number
of graphs; `torch.export` is the program itself, and its seconds; `onnx` PyTorch's exporter and ONNX Runtime, `openvino`
the same file in OpenVINO, `torchscript` the former exporter and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import timm
import torch
import torch._dynamo.testing
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models import swin_transformer

import hvt_backbones as hvt
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.exported import openvino_core
from hvt_backbones.ops import any_size

from . import measure

EXAMPLE = (232, 172)  # which patches divide, as timm asks for, and windows do not
SIZES = ((224, 224), (256, 192), (97, 131), (300, 260), (64, 64), (181, 359))
NEAR = 1e-4
LIMIT = 180  # seconds of the processor for one file
DEPTHS = (2, 1, 1, 2)  # windows of large and of small maps are shifted
WINDOWS = {"depths": DEPTHS, "num_heads": (1, 2, 4, 8)}
PYRAMID = {"embed_dims": (16, 32, 40, 64), "depths": DEPTHS}
Run = Callable[[Tensor], Tensor]
GRAPHS = torch._dynamo.testing.CompileCounter()  # whose backend runs what was traced as it stands


class Logits(nn.Module):
    """A model of transformers as a function of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def of_transformers(name: str, **arguments: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(num_labels=10, **arguments)
    return Logits(getattr(transformers, f"{name}ForImageClassification")(config))


def of_torchvision(side: int, **blocks: Any) -> nn.Module:
    return torchvision.models.SwinTransformer(
        [4, 4], 24, list(DEPTHS), list(WINDOWS["num_heads"]), [side, side], num_classes=10, **blocks
    )


def ours(name: str, **arguments: Any) -> nn.Module:
    return hvt.create_classifier(name, num_classes=10, **arguments)


def of_timm(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, num_classes=10, **arguments)


SWIN = {"embed_dim": 24, **WINDOWS}
MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "Swin": {
        "hvt": lambda: ours("swin_tiny", **SWIN),
        "timm": lambda: of_timm("swin_tiny_patch4_window7_224", strict_img_size=False, **SWIN),
        "torchvision": lambda: of_torchvision(7),
        "transformers": lambda: of_transformers("Swin", **SWIN),
    },
    "SwinV2": {
        "hvt": lambda: ours("swinv2_tiny_window8", **SWIN),
        "timm": lambda: of_timm("swinv2_tiny_window8_256", strict_img_size=False, **SWIN),
        "torchvision": lambda: of_torchvision(
            8, block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2
        ),
        "transformers": lambda: of_transformers("Swinv2", window_size=8, **SWIN),
    },
    "PVTv2": {
        "hvt": lambda: ours("pvt_v2_b0", **PYRAMID),
        "timm": lambda: of_timm("pvt_v2_b0", **PYRAMID),
        "transformers": lambda: of_transformers(
            "PvtV2", hidden_sizes=[16, 32, 40, 64], depths=list(DEPTHS), num_attention_heads=[1, 2, 5, 8]
        ),
    },
    "Twins-SVT": {
        "hvt": lambda: ours("twins_svt_small", embed_dims=(16, 32, 64, 128), depths=DEPTHS),
        "timm": lambda: of_timm("twins_svt_small", embed_dims=(16, 32, 64, 128), depths=DEPTHS),
    },
}


def compiled(model: nn.Module, images: Tensor, folder: Path) -> Run:
    torch.compiler.reset()
    GRAPHS.clear()
    found = torch.compile(model, dynamic=True, fullgraph=True, backend=GRAPHS)
    found(images)
    return found


def program(model: nn.Module, images: Tensor, folder: Path) -> Run:
    return exported(model, images).module()


def exported(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    return torch.export.export(model, (images,), dynamic_shapes=shapes)


def write_onnx(model: nn.Module, images: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        torch.onnx.export(exported(model, images), (images,), path, dynamo=True, external_data=False, verbose=False)
    return path


def run_onnx(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # refused sizes are counted
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def onnx(model: nn.Module, images: Tensor, folder: Path) -> Run:
    return run_onnx(write_onnx(model, images, folder))


def by_openvino(model: nn.Module, images: Tensor, folder: Path) -> Run:
    graph = openvino_core().read_model(write_onnx(model, images, folder))
    compiled = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())


def torchscript(model: nn.Module, images: Tensor, folder: Path) -> Run:
    path = folder / "former.onnx"
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    with any_size():  # of ours alone
        torch.onnx.export(model, (images,), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    return run_onnx(path)


ROUTES = {
    "torch.compile": compiled,
    "torch.export": program,
    "onnx": onnx,
    "openvino": by_openvino,
    "torchscript": torchscript,
}


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """
    Raises:
        TimeoutError: the solver of symbolic sizes, which is Python, takes more of the processor's time.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def eager_results(model: nn.Module) -> dict[Tensor, Tensor]:
    """Images of each size that the model takes -> its logits."""
    generator, found = torch.Generator().manual_seed(1), {}
    for size in SIZES:
        images = torch.randn(1, 3, *size, generator=generator)
        with contextlib.suppress(Exception):
            found[images] = model(images)
    return found


def right(run: Run, expected: dict[Tensor, Tensor]) -> int:
    count = 0
    for images, logits in expected.items():
        try:
            count += bool((run(images) - logits).abs().max() <= NEAR * logits.abs().max())
        except TimeoutError:
            raise
        except Exception:  # a size that the file refuses
            pass
    return count


def lines(routes: Sequence[str], libraries: Sequence[str]) -> Iterator[list[str]]:
    for family, models in MODELS.items():
        for library, build in models.items():
            if library not in libraries:
                continue
            torch.manual_seed(0)
            model = build().eval()
            cells = [family, library]
            example = torch.randn(2, 3, *EXAMPLE)
            with tempfile.TemporaryDirectory() as folder:
                expected, late = eager_results(model), False
                refused = f" ({len(SIZES) - len(expected)})" if len(expected) < len(SIZES) else ""
                for name in routes:
                    try:
                        if late and name in ("onnx", "openvino"):  # which begin with the same program
                            raise TimeoutError(f"more than {LIMIT} s")
                        start = time.process_time()
                        with at_most(LIMIT):
                            count = right(ROUTES[name](model, example, Path(folder)), expected)
                        if time.process_time() - start >= LIMIT:  # dynamo tells it as an error of its own
                            raise TimeoutError(f"more than {LIMIT} s")
                        found = f"{count} of {len(expected)}{refused}"
                        if name == "torch.compile":
                            found += f", {GRAPHS.frame_count} graphs"
                        if name in ("torch.compile", "torch.export"):
                            found += f", {time.process_time() - start:.0f} s"
                    except Exception as error:
                        late = late or (isinstance(error, TimeoutError) and name == "torch.export")
                        found = f"> {LIMIT} s" if isinstance(error, TimeoutError) else "no file"
                        print(f"{family} {library} {name}: {' '.join(str(error).split())[:300]}", file=sys.stderr)
                    cells.append(found)
            print(f"{family} {library}: done", file=sys.stderr)
            yield cells


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m benchmarks.exports", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), help="by default all")
    parser.add_argument("--libraries", nargs="+", choices=MODELS["Swin"], default=list(MODELS["Swin"]), help="as above")
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with torch.no_grad():
        table = [["family", "library", *arguments.routes], *lines(arguments.routes, arguments.libraries)]
    versions = ", ".join(
        f"{package.__name__} {package.__version__}"
        for package in (torch, timm, torchvision, transformers, onnxruntime, openvino)
    )
    chosen = [f"--{name} {' '.join(words)}" for name, words in vars(arguments).items()]
    print("python -m benchmarks.exports", *chosen)
    print(f"{measure.machine(torch.device('cpu'))['cpu']}, {versions}, revision {measure.revision()}")
    print(measure.aligned(table, left=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
