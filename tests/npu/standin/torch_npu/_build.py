"""Compile the device with the system's compiler, once for each torch, Python and state of the sources."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from filelock import FileLock

SOURCES = Path(__file__).with_name("csrc")
NAME = "torch_npu._C"


def load() -> ModuleType:
    """The compiled module; processes that need it at the same time wait for the first one to build it.

    Raises:
        RuntimeError: the compiler is missing or fails; the message ends with what it said.
    """
    compiler = os.environ.get("CXX", "g++")
    torch_folder = Path(torch.__file__).parent
    headers = torch_folder / "include"
    # fmt: off
    command = [
        compiler, "-O1", "-std=c++20", "-shared", "-fPIC", "-o", "{library}", str(SOURCES / "module.cpp"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-DTORCH_EXTENSION_NAME={NAME[-2:]}",
        f"-isystem{headers}", f"-isystem{headers / 'torch/csrc/api/include'}",
        f"-isystem{sysconfig.get_paths()['include']}",
        f"-L{torch_folder / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10",
    ]
    # fmt: on
    digest = hashlib.sha256(repr((command, torch.__version__, platform.platform())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(cache) / f"hvt_npu_standin_{sysconfig.get_config_var('SOABI')}_{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "_C.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            _compile([str(folder / "part.so") if word == "{library}" else word for word in command])
            os.replace(folder / "part.so", library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"the stand-in NPU is compiled with {command[0]}, which is not installed") from None
    if result.returncode:
        raise RuntimeError(f"{command[0]} could not compile the stand-in NPU:\n{result.stderr[-4000:]}")
