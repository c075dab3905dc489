"""`import hvt_backbones` is quick and leaves the heavy packages alone."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

HEAVY = {
    "torchvision", "timm", "transformers", "mmengine", "mmcv", "mmdet", "mmseg", "mmaction", "PIL", "matplotlib",
    "accelerate", "sklearn", "huggingface_hub", "cv2", "yaml",
}  # fmt: skip


def in_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_leaves_heavy_packages_alone() -> None:
    code = """
import json, sys, torch
before = set(sys.modules)
import hvt_backbones
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    imported = set(json.loads(in_new_process(code)))
    assert "hvt_backbones" in imported
    assert not imported & HEAVY


def test_import_starts_no_device() -> None:
    code = "import hvt_backbones, torch; print(torch.cuda.is_initialized())"
    assert in_new_process(code).strip() == "False"


def test_import_costs_little_more_than_torch() -> None:
    code = """
import time, torch
start = time.process_time()
import hvt_backbones
print(time.process_time() - start)
"""
    # processor time, so that other work on the machine does not count
    assert statistics.median(float(in_new_process(code)) for _ in range(3)) < 0.3


def test_public_names_are_there() -> None:
    import hvt_backbones

    for name in hvt_backbones.__all__:
        assert hasattr(hvt_backbones, name), name
    with pytest.raises(AttributeError):
        _ = hvt_backbones.create_detector
