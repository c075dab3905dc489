"""`import hvt_backbones` is quick and leaves the heavy packages alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torchvision",
    "timm",
    "transformers",
    "mmengine",
    "mmcv",
    "mmdet",
    "mmseg",
    "mmaction",
    "PIL",
    "matplotlib",
    "accelerate",
    "sklearn",
    "huggingface_hub",
    "cv2",
    "yaml",
}


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_leaves_heavy_packages_and_devices_alone() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import hvt_backbones
imported = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps([imported, torch.cuda.is_initialized()]))
"""
    imported, device_started = json.loads(in_new_process(code))
    assert "hvt_backbones" in imported
    assert not set(imported) & HEAVY
    assert not device_started


def test_import_costs_little_more_than_torch() -> None:
    code = """
import time, torch
start = time.process_time()
import hvt_backbones
print(time.process_time() - start)
"""
    # processor time, and the least of a few: other work on the machine does not count
    costs = []
    while len(costs) < 4 and min(costs, default=1.0) > 0.3:
        costs.append(float(in_new_process(code)))
    assert min(costs) <= 0.3, costs


def test_public_names_are_there() -> None:
    import hvt_backbones

    for name in hvt_backbones.__all__:
        assert hasattr(hvt_backbones, name), name
    with pytest.raises(AttributeError):
        _ = hvt_backbones.create_detector
