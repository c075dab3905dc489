"""Our models beside timm's and torchvision's: time, share of the matrix-product rate, and peak training memory.

    python -m benchmarks.peers --out peers.json
    python -m benchmarks.peers --device cuda --dtype bfloat16 --batch 128

All competitors of a row live in one process, have the same weights, were seen to give the same outputs and gradients,
and are timed in turn, see `measure.interleave`. timm is measured as it comes, and once more with its fused attention
switched the other way where a model has it; the faster of the two is timm's best.

Stochastic depth and dropout are off: they would give each competitor random work of its own, and no outputs to
compare. Inference runs weights and images of `--dtype`; a training step keeps float32 weights and uses autocast.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hvt_backbones as hvt
from hvt_backbones.device import select_device
from hvt_backbones.errors import InputError, exit_on_input_error
from hvt_backbones.ops import IMPLEMENTATIONS, use_attention

from . import measure


@dataclass(frozen=True)
class Peers:
    """One model under each library's name. Windows must divide the maps, so `multiple` divides the image size."""

    timm: str
    torchvision: str | None = None
    image_size: int = 224
    multiple: int = 224


MODELS = {
    "swin_tiny": Peers("swin_tiny_patch4_window7_224", "swin_t"),
    "swinv2_tiny_window8": Peers("swinv2_tiny_window8_256", "swin_v2_t", image_size=256, multiple=256),
    "pvt_v2_b2": Peers("pvt_v2_b2", multiple=32),
    "twins_svt_small": Peers("twins_svt_small"),
}
MODES = ("inference", "train")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 1000
Factory = Callable[[], nn.Module]


@contextmanager
def timm_fused_attention(enable: bool) -> Iterator[None]:
    """timm's modules read this setting when they are built."""
    from timm import layers

    before = layers.use_fused_attn()
    layers.set_fused_attn(enable)
    try:
        yield
    finally:
        layers.set_fused_attn(bool(before))


def _build_timm(name: str, fused: bool | None = None) -> nn.Module:
    import timm

    with nullcontext() if fused is None else timm_fused_attention(fused):
        return timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0)


def _fused_flags(model: nn.Module) -> set[bool]:
    return {bool(module.fused_attn) for module in model.modules() if hasattr(module, "fused_attn")}


class WithAttention(nn.Module):
    """A model under one implementation of window attention."""

    def __init__(self, model: nn.Module, implementation: str) -> None:
        super().__init__()
        self.model, self.implementation = model, implementation

    def forward(self, images: Tensor) -> Tensor:
        with use_attention(self.implementation):
            return self.model(images)


def competitors(name: str, image_size: int, attention: Sequence[str] = ()) -> dict[str, Factory]:
    """How to build each competitor with the same random weights: "hvt", "timm", "timm-unfused", "torchvision", ...

    Args:
        attention: implementations of window attention to measure beside our default, as "hvt-NAME".
    """
    peers = MODELS[name]
    prototype = _build_timm(peers.timm)
    with torch.no_grad():
        for key, parameter in prototype.named_parameters():
            # norms and biases start as ones and zeros, position tables near zero: a swap of two would not show
            if parameter.dim() == 1 or "bias" in key:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = prototype.state_dict()

    def ours(implementation: str | None = None) -> nn.Module:
        model = hvt.create_classifier(name, num_classes=CLASSES, drop_path_rate=0.0)
        hvt.load_weights(model, weights, layout="timm")
        return WithAttention(model, implementation) if implementation else model

    def timms(fused: bool | None = None) -> nn.Module:
        model = _build_timm(peers.timm, fused)
        model.load_state_dict(weights)
        return model

    def torchvisions() -> nn.Module:
        import torchvision

        model = getattr(torchvision.models, peers.torchvision)(num_classes=CLASSES)
        for module in model.modules():
            if isinstance(module, torchvision.ops.StochasticDepth):
                module.p = 0.0  # the builders fix it
        window = 7 if name.startswith("swin_") else 8
        converted = hvt.convert_state_dict(weights, to="torchvision", layout="timm", window_size=window)
        model.load_state_dict(converted)
        return model

    found: dict[str, Factory] = {"hvt": ours}
    found |= {f"hvt-{one}": lambda one=one: ours(one) for one in attention}
    found["timm"] = timms
    flags = _fused_flags(prototype)
    if flags:
        fused = not all(flags)
        found["timm-fused" if fused else "timm-unfused"] = lambda: timms(fused)
    if peers.torchvision:
        found["torchvision"] = torchvisions
    return found


def assert_equal(models: dict[str, nn.Module], images: Tensor, limit: float) -> dict[str, float]:
    """Compare outputs and image gradients with timm's, by max|a - b| / max|b|; the larger of the two for each.

    Raises:
        AssertionError: a competitor computes something else, so its time means nothing.
    """
    results = {}
    for name, model in models.items():
        with torch.inference_mode():
            logits = model.eval()(images)
        inputs = images.clone().requires_grad_()
        loss = model.train()(inputs).square().sum()
        results[name] = logits.clone(), torch.autograd.grad(loss, inputs)[0]
    errors = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(pair, results["timm"], strict=True))
        for name, pair in results.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < limit}
    assert not wrong, f"not the function that timm computes: {wrong}, limit {limit}"
    return errors


def inference(model: nn.Module, images: Tensor) -> measure.Work:
    model.eval()

    def call() -> None:
        with torch.inference_mode():
            model(images)

    return call


def training_step(
    model: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype, optimiser: str
) -> measure.Work:
    """Forward, cross entropy, backward, optimiser step (foreach), gradients freed."""
    model.train()
    if optimiser == "adamw":
        update: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)
    else:
        update = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, foreach=True)
    reduced = dtype != torch.float32

    def call() -> None:
        with torch.autocast(images.device.type, dtype) if reduced else nullcontext():
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return call


def count_flops(name: str, image_size: int) -> dict[str, int]:
    """Operations (2 per multiply-add) of one image in products and convolutions, counted on timm's unfused model.

    A training step counts as three times the forward pass, as is usual: every product and convolution has two in the
    backward pass. (torch's own count of the backward pass takes depthwise convolutions for dense ones.)
    """
    model = _build_timm(MODELS[name].timm, fused=False).to("meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    forward = counter.get_total_flops()
    return {"inference": forward, "train": 3 * forward}


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    batch: int
    image_size: int
    rounds: int
    warmup: int
    optimiser: str
    attention: tuple[str, ...]


def measure_model(name: str, modes: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """One row per mode: times of all competitors, and their peak memory in a training step."""
    torch.manual_seed(0)
    device, dtype, size = settings.device, settings.dtype, settings.image_size
    factories = competitors(name, size, settings.attention)
    images = torch.randn(settings.batch, 3, size, size).to(device)
    targets = torch.randint(CLASSES, (settings.batch,)).to(device)
    exact = torch.get_float32_matmul_precision() == "highest"
    models = {key: build().to(device) for key, build in factories.items()}
    errors = assert_equal(models, images[:1], limit=1e-4 if exact else 2e-2)
    flops = count_flops(name, size)

    for mode in modes:
        memory: dict[str, int] = {}
        if mode == "train":
            del models
            for key, build in factories.items():
                memory[key] = measure.peak_memory(
                    lambda build=build: training_step(build().to(device), images, targets, dtype, settings.optimiser),
                    device,
                )
            models = {key: build().to(device) for key, build in factories.items()}
            works = {
                key: training_step(model, images, targets, dtype, settings.optimiser) for key, model in models.items()
            }
        else:
            cast = {key: copy.deepcopy(model).to(dtype) for key, model in models.items()}
            works = {key: inference(model, images.to(dtype)) for key, model in cast.items()}
        samples = measure.interleave(works, device, rounds=settings.rounds, warmup=settings.warmup)
        works.clear()
        gc.collect()
        yield {"model": name, "mode": mode, **_row(samples, memory, errors, flops[mode] * settings.batch, settings)}


def _row(
    samples: dict[str, list[float]], memory: dict[str, int], errors: dict[str, float], flops: int, settings: Settings
) -> dict[str, Any]:
    timms = [name for name in samples if name.startswith("timm")]
    best = min(timms, key=lambda name: measure.Summary.of(samples[name]).median)
    row: dict[str, Any] = {
        "image_size": settings.image_size,
        "batch": settings.batch,
        "flops": flops,
        "timm_best": best,
        "competitors": {},
    }
    for name, times in samples.items():
        summary, ratio = measure.Summary.of(times), measure.paired_ratio(times, samples[best])
        row["competitors"][name] = {
            "median_s": summary.median,
            "min_s": summary.minimum,
            "iqr_s": summary.spread,
            "images_per_s": settings.batch / summary.median,
            "ratio_to_timm_best": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
            "flops_per_s": flops / summary.median,
            "error_to_timm": errors[name],
            "samples_s": times,
        }
        if memory:
            row["competitors"][name] |= {
                "peak_training_bytes": memory[name],
                "memory_ratio_to_timm_lowest": memory[name] / min(memory[one] for one in timms),
            }
    return row


def table(report: dict[str, Any]) -> str:
    rate = report["matmul_rate"]["flops_per_second"]
    header = (
        "model",
        "mode",
        "competitor",
        "median ms",
        "min",
        "IQR",
        "x timm best",
        "(quartiles)",
        "images/s",
        "of matmul rate",
        "peak MiB",
        "x timm",
    )
    lines = [header]
    for row in report["rows"]:
        for name, entry in row["competitors"].items():
            low, high = entry["ratio_quartiles"]
            memory = entry.get("peak_training_bytes")
            lines.append(
                (
                    row["model"],
                    row["mode"],
                    name + (" *" if name == row["timm_best"] else ""),
                    f"{1e3 * entry['median_s']:.2f}",
                    f"{1e3 * entry['min_s']:.2f}",
                    f"{1e3 * entry['iqr_s']:.2f}",
                    f"{entry['ratio_to_timm_best']:.3f}",
                    f"({low:.3f}-{high:.3f})",
                    f"{entry['images_per_s']:.1f}",
                    f"{entry['flops_per_s'] / rate:.1%}",
                    f"{memory / 2**20:.1f}" if memory else "",
                    f"{entry['memory_ratio_to_timm_lowest']:.3f}" if memory else "",
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Compare our models with timm's and torchvision's."
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, npu or auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tf32", action="store_true", help="let CUDA round float32 factors to tf32; without it, none")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, help="default: 224, 256 for SwinV2")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each competitor")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before, not kept")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw", help="of the training step")
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=[],
        metavar="NAME",
        help=f"also measure ours with these implementations: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")
    options = parser.parse_args(argv)
    for name in options.models:
        if name not in MODELS:
            near = difflib.get_close_matches(name, MODELS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"no peers are known for {name!r}: {hint}choose from {', '.join(MODELS)}")
        multiple = MODELS[name].multiple
        if options.image_size is not None and (options.image_size < 1 or options.image_size % multiple):
            raise InputError(f"--image-size {options.image_size}: {name} needs a multiple of {multiple}")
    for argument in ("batch", "rounds", "threads"):
        value = getattr(options, argument)
        if value is not None and value < 1:
            raise InputError(f"--{argument} must be at least 1, got {value}")
    if options.out and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise InputError(f"--out {options.out}: give a file in a folder that exists")
    return options


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    device = select_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = options.tf32
    dtype = DTYPES[options.dtype]
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "revision": measure.revision(),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": measure.machine(device),
        "matmul_rate": measure.matmul_rate(device, dtype),
        "rows": [],
    }
    for name in options.models:
        settings = Settings(
            device,
            dtype,
            options.batch,
            options.image_size or MODELS[name].image_size,
            options.rounds,
            options.warmup,
            options.optimizer,
            tuple(options.attention),
        )
        for row in measure_model(name, options.modes, settings):
            report["rows"].append(row)
            print(f"{row['model']} {row['mode']}: done", file=sys.stderr)
    # once more at the end: the machine may have been busy at the start
    report["matmul_rate"] = max(
        report["matmul_rate"], measure.matmul_rate(device, dtype), key=lambda rate: rate["flops_per_second"]
    )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    machine = report["machine"]
    print(
        f"{machine.get('device_name') or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{options.dtype}{' (tf32)' if options.tf32 else ''}, batch {options.batch}, matrix products at "
        f"{report['matmul_rate']['flops_per_second'] / 1e9:.0f} GFLOP/s, revision {report['revision']}"
    )
    print(table(report))
    print("* timm's best; ratios are medians of ratios within a round, below 1 is faster")


if __name__ == "__main__":
    raise SystemExit(main())
