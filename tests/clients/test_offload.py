"""accelerate moves weights between calls; the numbers are those of the model in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map, load_checkpoint_and_dispatch
from accelerate.utils import compute_module_sizes
from safetensors.torch import save_file
from torch import nn

from ..families import images
from .models import SIZES, Make, every_model, maps, same, scalar

CPU = torch.device("cpu")


def to_cpu(model: nn.Module, empty: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=CPU)


def to_disk(model: nn.Module, empty: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=CPU)


def some_to_disk(model: nn.Module) -> dict[str, str]:
    """Half of the bytes in memory; blocks may be split."""
    half = compute_module_sizes(model)[""] // 2
    devices = infer_auto_device_map(model, max_memory={"cpu": half, "disk": 4 * half})
    assert set(devices.values()) == {"cpu", "disk"}
    return devices


def dispatched(model: nn.Module, empty: nn.Module, folder: Path) -> nn.Module:
    return dispatch_model(model, some_to_disk(model), main_device="cpu", offload_dir=str(folder))


def loaded(model: nn.Module, empty: nn.Module, folder: Path) -> nn.Module:
    save_file(model.state_dict(), folder / "model.safetensors")
    return load_checkpoint_and_dispatch(
        empty, str(folder / "model.safetensors"), some_to_disk(model), offload_folder=str(folder)
    )


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")
@every_model
@pytest.mark.parametrize("offload", [to_cpu, to_disk, dispatched, loaded])
def test_weights_that_lie_elsewhere(family: str, make: Make, offload: Callable, tmp_path: Path) -> None:
    model = make(family).eval()
    with torch.device("meta"):
        empty = make(family).eval()
    given = [images(family, *size).requires_grad_() for size in SIZES]
    expected = [maps(model, x) for x in given]
    gradients = [torch.autograd.grad(scalar(found), x)[0] for found, x in zip(expected, given, strict=True)]
    model = offload(model, empty, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    for x, there, gradient in zip(given, expected, gradients, strict=True):
        with torch.no_grad():
            same(maps(model, x), there)
        found = maps(model, x)
        same(found, there)
        same(torch.autograd.grad(scalar(found), x), [gradient], near=1e-3)
