"""Every case of the reference folder: our outputs and gradients are those of the official codes.

The folder is `HVT_REFERENCE_DIR`, or `shared/reference` beside the checkout; its README states the limits used here.
"""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hvt_backbones as hvt

from .conftest import reference_dir
from .reference_cases import Case, NamedVariant, build, empty_model, find_cases, gradients, loss, make_model, outputs

CASES = find_cases(reference_dir())


@pytest.fixture(autouse=True)
def need_cases() -> None:
    if not CASES:
        pytest.skip(f"no reference cases in {reference_dir()}: set HVT_REFERENCE_DIR")


def error(ours: Tensor, stored: Tensor) -> float:
    assert ours.shape == stored.shape, f"shape {tuple(ours.shape)} instead of {tuple(stored.shape)}"
    stored = stored.to(ours.dtype)
    return float((ours.detach() - stored).abs().max() / stored.abs().max())


def test_the_folder_holds_cases_of_every_family() -> None:
    assert {case.family for case in CASES} >= {"swin", "swinv2", "pvt_v2", "twins"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    model = build(case).to(dtype).eval()
    images = case.tensors["input"].to(dtype).requires_grad_()
    double = dtype == torch.float64

    found = outputs(case, model, images)
    errors = {}
    for name, stored in case.tensors.items():
        if name not in ("input", "mask") and not name.startswith("grad"):
            errors[name] = (error(found[name], stored), 1e-5 if double else 1e-4)
    for name, ours, stored in gradients(case, model, images, loss(case, found)):
        limit = 1e-5 if double else max(1e-4, 20 * case.facts["float32_error_of_official"][name])
        errors[name] = (error(ours, stored), limit)

    assert set(errors) == set(case.facts["outputs"])
    wrong = {name: pair for name, pair in errors.items() if not pair[0] < pair[1]}
    assert not wrong, f"(error, limit): {wrong}"


def named_variants() -> list[NamedVariant]:
    file = reference_dir() / "variants.json.gz"
    if not file.exists():
        return []
    return [NamedVariant(name, row) for name, row in json.loads(gzip.decompress(file.read_bytes()))["variants"].items()]


@pytest.mark.parametrize("variant", named_variants(), ids=str)
def test_named_variant(variant: NamedVariant) -> None:
    """The official model has as many parameters as ours, and its state dict loads with every key accounted for."""
    model = empty_model(variant)
    assert sum(p.numel() for p in model.parameters()) == variant.num_parameters - variant.unused_parameters

    report = hvt.load_weights(model, variant.weights, layout="official")
    assert report.ok
    assert not report.initialised
    assert set(report.loaded) == {name for name, _ in model.named_parameters()}
    accounted = {key for row in report.reasons.values() for key in row}
    assert all(
        key.endswith(("relative_position_index", "relative_coords_table", "attn_mask"))
        for key in accounted & variant.buffers
    )


@pytest.mark.parametrize("case", [case for case in CASES if "inflation" in case.facts], ids=str)
def test_inflation_is_the_official_one(case: Case) -> None:
    images = load_file(case.folder / "weights2d.safetensors")
    inflated = hvt.inflate(images, window_size=case.kwargs["window_size"], patch_frames=case.kwargs["patch_size"][0])
    ours = hvt.convert_state_dict(inflated, to=case.layout, window_size=case.kwargs["window_size"])
    assert ours.keys() == case.weights.keys()
    assert max(error(ours[key].double(), stored) for key, stored in case.weights.items()) < 1e-6

    model = make_model(case)
    report = hvt.load_weights(model, images)
    assert not report.initialised
    assert len(report.inflated) == 1 + sum(case.kwargs["depths"])
    assert all(torch.equal(tensor, inflated[key]) for key, tensor in model.state_dict().items())
