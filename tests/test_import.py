"""`import hvt_backbones` is quick and leaves the heavy packages alone."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

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


PACKAGES = ("hvt_backbones", "classification", "detection", "segmentation", "video", "runner", "demos", "soak")


def imported_by(path: Path, module: str, known: Collection[str]) -> set[str]:
    """The modules of `known` that one imports, inside functions too."""
    names = set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{source}.{alias.name}": source for alias in node.names}
            names |= {name if name in known else package for name, package in inner.items()}
    return names & set(known) - {module}


def test_no_circle_of_imports() -> None:
    """Those for types alone count, too."""
    root = Path(__file__).parents[1]
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
        if "configs" not in path.parts
    }
    order = graphlib.TopologicalSorter({module: imported_by(path, module, files) for module, path in files.items()})
    try:
        order.prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")
