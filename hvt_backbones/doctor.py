"""What is installed, which devices there are, where downloads go, and what is missing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import InputError
from .npu_doctor import examine_npu, report_npu
from .version import __version__

# Distribution -> what it is for, and how to get it. The first name of several is the one to install.
REQUIRED = ("torch", "torchvision", "timm", "numpy", "safetensors", "huggingface_hub")
OPTIONAL: dict[tuple[str, ...], tuple[str, str]] = {
    ("accelerate",): ("training", "pip install accelerate"),
    ("PyYAML",): ("training", "pip install PyYAML"),
    ("scikit-learn",): ("the digits recipe", "pip install scikit-learn"),
    ("matplotlib",): ("pictures of curves and predictions", "pip install matplotlib"),
    ("transformers",): ("models of Hugging Face", "pip install transformers"),
    ("onedl-mmengine", "mmengine"): ("detection, segmentation, video", "make install-all"),
    ("onedl-mmcv", "mmcv"): ("detection, segmentation, video", "make install-all"),
    ("onedl-mmdetection", "mmdet"): ("detection", "make install-all"),
    ("onedl-mmsegmentation", "mmsegmentation"): ("segmentation", "make install-all"),
    ("mmaction2",): ("video", "make install-all"),
    ("torch_npu",): ("Ascend devices", "pip install the torch_npu release of your torch version"),
    ("onnx",): ("export", "pip install onnx"),
    ("onnxruntime",): ("export", "pip install onnxruntime"),
}


def installed_version(*distributions: str) -> str | None:
    for distribution in distributions:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def examine(*, npu: bool = False) -> dict[str, Any]:
    """Everything `hvt doctor` says, as plain data; with `npu`, what an Ascend NPU lacks is a warning in any case."""
    packages = {name: _package(installed_version(name), "required", f"pip install {name}") for name in REQUIRED}
    for names, (purpose, command) in OPTIONAL.items():
        packages[names[0]] = _package(installed_version(*names), purpose, command)
    devices, warnings = _devices()
    caches, cache_warnings = _caches()
    ascend = examine_npu(wanted=npu)
    npu_warnings = [f"NPU: {problem['what']}: {problem['remedy']}" for problem in ascend["problems"]]
    return {
        "hvt_backbones": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "devices": devices,
        "npu": ascend,
        "caches": caches,
        "warnings": _version_warnings(packages) + warnings + npu_warnings + cache_warnings,
    }


def _package(found: str | None, purpose: str, command: str) -> dict[str, str | None]:
    return {"version": found, "for": purpose, "install": None if found else command}


def _version_warnings(packages: dict[str, dict[str, str | None]]) -> list[str]:
    warnings = []
    for name in REQUIRED:
        if packages[name]["version"] is None:
            warnings.append(f"{name} is required and missing: pip install {name}")
    # looked for as a file: to find a submodule by name would import mmcv, which takes seconds
    mmcv = find_spec("mmcv")
    if mmcv and not any(any(Path(folder).glob("_ext*")) for folder in mmcv.submodule_search_locations or ()):
        warnings.append("mmcv was built without its operators (no mmcv._ext): rebuild it with --no-build-isolation")
    for fork, upstream in (("onedl-mmengine", "mmengine"), ("onedl-mmcv", "mmcv"), ("onedl-mmdetection", "mmdet")):
        if installed_version(fork) and installed_version(upstream):
            warnings.append(f"{fork} and {upstream} are both installed and overwrite each other: uninstall one")
    return warnings


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    from .device import DISTRIBUTED_BACKENDS, select_device

    processor = platform.processor() or platform.machine()
    devices: list[dict[str, Any]] = [{"device": "cpu", "name": processor, "threads": torch.get_num_threads()}]
    try:
        accelerator = select_device("auto")
    except (InputError, ImportError, RuntimeError, OSError) as error:  # a broken driver: say so, do not fall over
        return devices, [f"the accelerator cannot be used: {error}"]
    if accelerator.type == "cpu":
        return devices, []
    api = torch.get_device_module(accelerator)
    for index in range(torch.accelerator.device_count()):
        properties = api.get_device_properties(index)
        devices.append(
            {
                "device": f"{accelerator.type}:{index}",
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "distributed": DISTRIBUTED_BACKENDS[accelerator.type],
            }
        )
    return devices, []


def _caches() -> tuple[dict[str, str], list[str]]:
    caches = {"torch": torch.hub.get_dir()}
    if find_spec("huggingface_hub"):
        from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

        caches = {"huggingface_hub": HF_HUB_CACHE, **caches}
        warnings = ["HF_HUB_OFFLINE is set: only weights already in the cache are found"] if HF_HUB_OFFLINE else []
    else:
        warnings = []
    for name, folder in caches.items():
        existing = Path(folder)
        while not existing.exists():
            existing = existing.parent
        if not os.access(existing, os.W_OK):
            variable = {"huggingface_hub": "HF_HOME", "torch": "TORCH_HOME"}[name]
            warnings.append(f"{folder} cannot be written, so nothing can be downloaded to it: set {variable}")
    return caches, warnings


def report(findings: dict[str, Any]) -> str:
    """The findings of `examine` as text."""
    packages = findings["packages"]
    width = max(map(len, packages))
    lines = [f"hvt_backbones {findings['hvt_backbones']}, Python {findings['python']}, {findings['system']}"]
    lines += ["", "packages"]
    for name, package in packages.items():
        state = package["version"] or f"missing ({package['for']}): {package['install']}"
        lines.append(f"  {name:{width}}  {state}")
    lines += ["", "devices"]
    for device in findings["devices"]:
        facts = [device["name"]]
        facts += [f"{device['threads']} threads"] if "threads" in device else []
        facts += [f"{device['memory_gib']} GiB", device["distributed"]] if "memory_gib" in device else []
        lines.append(f"  {device['device']:{width}}  {', '.join(facts)}")
    lines += ["", "Ascend NPU", *report_npu(findings["npu"], width)]
    lines += ["", "downloads go to"]
    lines += [f"  {name:{width}}  {folder}" for name, folder in findings["caches"].items()]
    lines += ["", "warnings"]
    lines += [f"  {warning}" for warning in findings["warnings"]] or ["  none"]
    return "\n".join(lines)
