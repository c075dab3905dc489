"""Our models on a device against the CPU in float64: outputs, gradients, reduced precision, the reference cases.

    python -m benchmarks.gpu_checks --device cuda --out checks.json

Needs PyTorch and this checkout, no test runner. The reference cases are those of the folder `HVT_REFERENCE_DIR`, or of
`shared/reference` beside the checkout. Exit status: 0 all passed, 1 a check failed, 2 bad input.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from hvt_backbones.device import select_device
from hvt_backbones.errors import ArgumentParser, exit_on_input_error
from hvt_backbones.ops import IMPLEMENTATIONS, use_attention, window_attention

from . import measure
from .comparison import output_file

Errors = dict[str, tuple[float, float]]  # quantity -> error, limit
Check = tuple[str, str, Callable[[], Errors]]  # group, name, what to run

# far above the rounding of the type, far below a mistake; float32's is also below what tf32 would give
ATTENTION_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
MODEL_LIMIT = 1e-4
AUTOCAST_LIMITS = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
# name: (spatial, window, shift)
MAPS = {
    "divides": ((8, 8), (4, 4), (0, 0)),
    "shifted": ((8, 8), (4, 4), (2, 2)),
    "odd": ((9, 13), (4, 3), (2, 1)),
    "small": ((3, 5), (7, 7), (0, 0)),
    "one_axis_shifted": ((14, 14), (7, 7), (0, 3)),
    "clip": ((4, 9, 6), (2, 4, 4), (1, 2, 2)),
}
FORMS = ("dot", "cosine", "mask_padding")
NOT_WINDOWED = ("pvt_v2", "pvt_v2_linear", "twins_pcpvt")
SIZES = {"even": (64, 64), "odd": (70, 58)}


def _from_tests(name: str) -> ModuleType:
    """A module of the tests that needs no test runner: the tiny models and the reader of cases are written once."""
    path = measure.ROOT / "tests" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def relative_error(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """||ours - truth|| / ||truth|| over all tensors together, in float64 on the CPU."""
    pairs = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(ours, truth, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that an element which nobody writes shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators without a deterministic form, which is no matter here
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(False)


# ---- the operation ----


def attention_checks(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    for name, form, implementation, dtype in itertools.product(MAPS, FORMS, implementations(device), dtypes):
        run = partial(_attention, *MAPS[name], form, implementation, device, dtype)
        yield "attention", f"{implementation} {name} {form} {_short(dtype)}", run


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def implementations(device: torch.device) -> list[str]:
    """Those that take a map on the device."""
    qkv = torch.empty(1, device=device)
    return [name for name, one in IMPLEMENTATIONS.items() if one.refuses(qkv) is None]


def _attention(
    spatial: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], form: str, implementation: str,
    device: torch.device, dtype: torch.dtype,
) -> Errors:  # fmt: skip
    heads, width = 3, 8
    tokens = torch.tensor(window).prod().item()
    # rounded to the dtype first: both sides get the same numbers
    qkv = torch.randn(2, *spatial, 3 * heads * width).to(dtype)
    bias = torch.randn(heads, tokens, tokens).to(dtype)
    extra = {"pad_value": torch.randn(3 * heads * width).to(dtype)}
    if form == "cosine":
        extra["logit_scale"] = torch.rand(heads, 1, 1).add(5).to(dtype)
    cotangent = torch.randn(2, *spatial, heads * width).to(dtype)

    def evaluate(name: str, target: torch.device, kind: torch.dtype) -> list[Tensor]:
        # what scales or biases the logits is float32 at least, as in the models
        wide = torch.promote_types(kind, torch.float32)
        kinds = {"pad_value": kind, "logit_scale": wide}
        leaves = {key: value.to(target, kinds[key]).requires_grad_() for key, value in extra.items()}
        leaves |= {"qkv": qkv.to(target, kind).requires_grad_(), "bias": bias.to(target, wide).requires_grad_()}
        options = {key: leaves[key] for key in extra}
        with use_attention(name):
            result = window_attention(
                leaves["qkv"], leaves["bias"], window, shift, heads, mask_padding=form == "mask_padding", **options
            )
        gradients = torch.autograd.grad(
            result, list(leaves.values()), cotangent.to(target, kind), allow_unused=True, materialize_grads=True
        )
        return [result, *gradients]

    truth = evaluate("reference", torch.device("cpu"), torch.float64)
    with poisoned_memory():
        ours = evaluate(implementation, device, dtype)
    limit = ATTENTION_LIMITS[dtype]
    return {
        "output": (relative_error(ours[:1], truth[:1]), limit),
        "gradients": (relative_error(ours[1:], truth[1:]), limit),
    }


# ---- the families ----


def family_checks(device: torch.device) -> Iterator[Check]:
    families = _from_tests("families")

    def run(check: Callable[..., Errors], family: str, size: str, *arguments: object) -> Errors:
        return check(families.tiny(family), families.images(family, *SIZES[size]), *arguments)

    for family in families.TINY:
        chosen = ["default", *(() if family in NOT_WINDOWED else implementations(device))]
        for size, one in itertools.product(SIZES, chosen):
            yield "families", f"{family} {size} {one}", partial(run, _family, family, size, one, device)
        for dtype, one in itertools.product(AUTOCAST_LIMITS, chosen):
            checked = partial(run, _autocast, family, "odd", one, device, dtype)
            yield "autocast", f"{family} {_short(dtype)} {one}", checked
        yield "families", f"{family} moved between devices", partial(run, _moved, family, "odd", device)


def _attention_named(implementation: str):
    return nullcontext() if implementation == "default" else use_attention(implementation)


def _maps_and_gradients(model: nn.Module, images: Tensor, cotangents: Sequence[Tensor]) -> list[list[Tensor]]:
    images = images.clone().requires_grad_()
    maps = model(images)
    scalar = sum((x * y.to(x)).sum() for x, y in zip(maps, cotangents, strict=True))
    gradients = torch.autograd.grad(scalar, [images, *model.parameters()], allow_unused=True, materialize_grads=True)
    return [list(maps), [gradients[0]], list(gradients[1:])]


def _family(model: nn.Module, images: Tensor, implementation: str, device: torch.device) -> Errors:
    with torch.no_grad():
        cotangents = [torch.randn_like(x) for x in model(images)]
    with use_attention("reference"):
        truth = _maps_and_gradients(copy.deepcopy(model).double(), images.double(), cotangents)
    with _attention_named(implementation):
        on_device = copy.deepcopy(model).to(device)
        ours = _maps_and_gradients(on_device, images.to(device), [x.to(device) for x in cotangents])
        channels_last = images.to(device).movedim(1, -1).contiguous().movedim(-1, 1)
        last = on_device(channels_last)
        on_device.set_grad_checkpointing(True)
        again = _maps_and_gradients(on_device, images.to(device), [x.to(device) for x in cotangents])
    names = ("maps", "gradient of the images", "gradients of the weights")
    errors = {name: (relative_error(a, b), MODEL_LIMIT) for name, a, b in zip(names, ours, truth, strict=True)}
    errors["maps of channels-last images"] = (relative_error(last, truth[0]), MODEL_LIMIT)
    errors["gradients with checkpointing"] = (relative_error(again[2], truth[2]), MODEL_LIMIT)
    return errors


def _autocast(
    model: nn.Module, images: Tensor, implementation: str, device: torch.device, dtype: torch.dtype
) -> Errors:
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(images.double())
        cotangents = [torch.randn_like(x, dtype=torch.float32).to(device) for x in truth]
    model = model.to(device)
    with _attention_named(implementation), torch.autocast(device.type, dtype):
        maps, *gradients = _maps_and_gradients(model, images.to(device), cotangents)
        with torch.no_grad():
            loud = model(1000 * images.to(device))
    infinite = sum(int((~x.isfinite()).sum()) for x in (*gradients[0], *gradients[1], *loud))
    return {"maps": (relative_error(maps, truth), AUTOCAST_LIMITS[dtype]), "values not finite": (infinite, 0.5)}


def _moved(model: nn.Module, images: Tensor, device: torch.device) -> Errors:
    """What a model caches in eval mode must follow it."""
    model.eval()
    with torch.inference_mode():
        first = model(images)
        second = model.to(device)(images.to(device))
        third = model.cpu()(images)
    return {
        "on the device": (relative_error(second, first), MODEL_LIMIT),
        "back again": (relative_error(third, first), MODEL_LIMIT),
    }


# ---- the reference cases ----


def reference_checks(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    reader = _from_tests("reference_cases")
    folder = Path(os.environ.get("HVT_REFERENCE_DIR") or measure.ROOT.parent / "shared" / "reference")
    cases = reader.find_cases(folder)
    built = [case for case in cases if (case.family, case.layout) in reader.BUILDERS]
    if not cases:
        print(f"no reference cases in {folder}: set HVT_REFERENCE_DIR to check them too")
    elif len(built) < len(cases):
        print(f"{len(cases) - len(built)} of {len(cases)} reference cases are of families that are not built yet")
    for case, dtype in itertools.product(built, dtypes):
        yield "reference cases", f"{case} {_short(dtype)}", partial(_reference, reader, case, device, dtype)


def _reference(reader: ModuleType, case, device: torch.device, dtype: torch.dtype) -> Errors:
    def error(ours: Tensor, stored: Tensor) -> float:
        stored = stored.to(ours)
        return float((ours.detach() - stored).abs().max() / stored.abs().max())

    model = reader.build(case).to(device, dtype).eval()
    images = case.tensors["input"].to(device, dtype).requires_grad_()
    double = dtype == torch.float64
    found = reader.outputs(case, model, images)
    errors = {
        name: (error(found[name], stored), 1e-5 if double else 1e-4)
        for name, stored in case.tensors.items()
        if name != "input" and not name.startswith("grad")
    }
    for name, ours, stored in reader.gradients(case, model, images, reader.loss(case, found)):
        limit = 1e-5 if double else max(1e-4, 20 * case.facts["float32_error_of_official"][name])
        errors[name] = (error(ours, stored), limit)
    return errors


# ---- the command ----


@dataclass(frozen=True)
class Outcome:
    """One check: its worst quantity by error over limit, or the exception that ended it."""

    group: str
    name: str
    passed: bool
    quantity: str = ""
    error: float = 0.0
    limit: float = 0.0
    exception: str = ""

    def __str__(self) -> str:
        detail = self.exception or f"{self.quantity}: error {self.error:.2e}, limit {self.limit:.0e}"
        return f"{self.group}: {self.name}: {detail}"


def severity(error: float, limit: float) -> float:
    """Error over limit; NaN, which compares false with everything, is the worst."""
    return float("inf") if error != error else error / limit


def judge(group: str, name: str, run: Callable[[], Errors]) -> Outcome:
    torch.manual_seed(0)
    try:
        errors = run()
    except Exception as exception:  # the checks after this one are wanted too
        return Outcome(group, name, False, exception=f"{type(exception).__name__}: {' '.join(str(exception).split())}")
    quantity = max(errors, key=lambda key: severity(*errors[key]))
    error, limit = errors[quantity]
    return Outcome(group, name, bool(error < limit), quantity, error, limit)


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m benchmarks.gpu_checks", description="Compare a device's results with the CPU's in float64."
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, npu or auto")
    parser.add_argument("--groups", nargs="+", default=["attention", "families", "reference"],
                        choices=["attention", "families", "reference"])  # fmt: skip
    parser.add_argument("--out", type=output_file, metavar="FILE", help="write every outcome there, as JSON")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    wide = [torch.float32] if device.type == "npu" else [torch.float64, torch.float32]  # Ascend has no float64 products

    start = time.perf_counter()
    checks: list[Check] = []
    if "attention" in options.groups:
        checks += attention_checks(device, [*wide, torch.float16, torch.bfloat16])
    if "families" in options.groups:
        checks += family_checks(device)
    if "reference" in options.groups:
        checks += reference_checks(device, wide)
    outcomes = []
    for group, name, run in checks:
        outcomes.append(judge(group, name, run))
        if not outcomes[-1].passed:
            print(f"FAILED {outcomes[-1]}", flush=True)

    for group, total in Counter(outcome.group for outcome in outcomes).items():
        own = [outcome for outcome in outcomes if outcome.group == group]
        print(f"{group}: {sum(outcome.passed for outcome in own)} of {total} passed")
        measured = [outcome for outcome in own if not outcome.exception]
        if measured:
            print(f"  nearest to its limit: {max(measured, key=lambda one: severity(one.error, one.limit))}")
    failed = sum(not outcome.passed for outcome in outcomes)
    machine = measure.machine(device)
    name, took = machine.get("device_name") or machine["cpu"], time.perf_counter() - start
    print(f"{len(outcomes) - failed} of {len(outcomes)} checks passed on {name} in {took:.0f} s")
    if options.out:
        measure.write_json(
            options.out,
            {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "revision": measure.revision(),
                "machine": machine,
                "failed": failed,
                "checks": [asdict(outcome) for outcome in outcomes],
            },
        )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
