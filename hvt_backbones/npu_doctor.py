"""What `hvt doctor` says about Ascend NPUs: torch_npu, CANN, driver, devices, and what is wrong with which.

torch imports every installed device backend by itself, and torch_npu needs CANN's libraries to be imported: without
them `import torch` fails. So nothing here imports torch at the top, and torch_npu is only tried in a process of its
own (`python -m hvt_backbones.npu_doctor`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # torch's switch for importing backends by itself; "1" where it is not set
# what libtorch_npu.so is linked with and CANN installs
CANN_LIBRARIES = ("libascendcl.so", "libhccl.so", "libge_runner.so", "libgraph.so", "libacl_op_compiler.so")
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set_env.sh sets them
DRIVER_LIBRARY = "libascend_hal.so"
DRIVER = "usr/local/Ascend/driver"
SECONDS = 180  # for torch_npu to be imported and a device to answer


@dataclass(frozen=True)
class Machine:
    """What the probes look at, so that a test can give a folder and variables of its own."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def library(self, name: str, *folders: Path) -> str | None:
        """The path of a shared library in LD_LIBRARY_PATH or `folders`."""
        searched = [Path(part) for part in self.environment.get("LD_LIBRARY_PATH", "").split(":") if part]
        return next((str(folder / name) for folder in (*searched, *folders) if (folder / name).is_file()), None)

    def cann_scripts(self) -> list[Path]:
        """Every `set_env.sh` where CANN's installer puts it: as root or not, since 8.5 ("cann") or before."""
        homes = [self.root / "usr/local/Ascend", Path(self.environment.get("HOME", "/nowhere")) / "Ascend"]
        scripts = [home / name / "set_env.sh" for home in homes for name in ("cann", "ascend-toolkit")]
        return [script for script in scripts if script.is_file()]

    def device_nodes(self) -> list[Path]:
        found = (self.root / "dev").glob("davinci[0-9]*")
        return sorted(found, key=lambda node: int(re.sub(r"\D", "", node.name)))


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a name for programs, a sentence for people, and what to do."""

    name: str
    what: str
    remedy: str


def examine_npu(machine: Machine | None = None, *, wanted: bool = False) -> dict[str, Any]:
    """The facts about torch_npu, CANN, driver and devices as plain data, with "problems".

    Args:
        machine: where to look; this machine by default.
        wanted: the user asks for an NPU, so that what is missing is a problem even where nothing hints at one.
    """
    machine = machine or Machine()
    package, package_problems = _package()
    cann, cann_problems = _cann(machine)
    driver, driver_problems = _driver(machine)
    hints = [*driver["device_nodes"], *(name for name in CANN_VARIABLES if name in machine.environment)]
    problems = []
    if package["version"] or wanted or hints:
        problems = package_problems + cann_problems + driver_problems
    loads = None
    if package["version"]:
        loads = _load(machine)
        problems += _load_problems(loads, explained=bool(cann_problems), no_device=bool(driver_problems))
    return {
        "torch_npu": package,
        "cann": cann,
        "driver": driver,
        "loads": loads,
        "problems": [vars(problem) for problem in problems],
    }


def release(version: str) -> str:
    """The numbers that a version begins with: "2.11.0" of "2.11.0.post3"; all of one that begins otherwise."""
    return re.split(r"[^\d.]", version)[0].rstrip(".") or version


def _package() -> tuple[dict[str, Any], list[Problem]]:
    torch_version = distribution("torch").version
    facts: dict[str, Any] = {"version": None, "torch": torch_version, "made_for_torch": None}
    try:
        found = distribution("torch_npu")
    except PackageNotFoundError:
        remedy = "install the release of your torch and CANN versions (classification/npu/README.md has a table)"
        return facts, [Problem("torch_npu_missing", "torch_npu is not installed", remedy)]
    stated = [re.match(r"torch\s*\(?==\s*([\d.]+)", text) for text in found.requires or ()]
    facts["version"] = found.version
    made_for = next((match[1] for match in stated if match), release(found.version))
    facts["made_for_torch"] = made_for
    if release(torch_version) == made_for:
        return facts, []
    what = f"torch_npu {found.version} is made for torch {made_for}, and torch {torch_version} is installed"
    return facts, [Problem("torch_mismatch", what, f"install torch {made_for}, or the torch_npu of your torch")]


def _cann(machine: Machine) -> tuple[dict[str, Any], list[Problem]]:
    named = {name: machine.environment[name] for name in CANN_VARIABLES if machine.environment.get(name)}
    home = next((Path(path) for path in named.values() if Path(path).is_dir()), None)
    folders = [] if home is None else [home / "lib64"]
    libraries = {name: machine.library(name, *folders) for name in CANN_LIBRARIES}
    facts = {"home": None if home is None else str(home), "version": _cann_version(home), "libraries": libraries}
    missing = [name for name, path in libraries.items() if path is None]
    if not missing:
        return facts, []
    scripts = machine.cann_scripts()
    if home is not None:
        what = f"CANN in {home} is incomplete, it lacks {', '.join(missing)}"
        problem = Problem("cann_incomplete", what, "install the CANN toolkit again, then source its set_env.sh")
    elif scripts:
        what = "CANN is installed, but this shell does not know it"
        problem = Problem("cann_not_set_up", what, f"source {scripts[0]}")
    elif named:
        name, path = next(iter(named.items()))
        what = f"CANN is missing, {name} names {path}, which is not a folder"
        problem = Problem("cann_missing", what, "source the set_env.sh of the CANN that is installed, or install it")
    else:
        what = f"CANN is missing (no {' or '.join(CANN_VARIABLES)}, no {missing[0]})"
        problem = Problem("cann_missing", what, "install the CANN toolkit of your torch_npu, source its set_env.sh")
    return facts, [problem]


def _cann_version(home: Path | None) -> str | None:
    # beside the libraries, or in the folder of the processor's architecture
    for file in (*home.glob("ascend_*_install.info"), *home.glob("*/ascend_*_install.info")) if home else ():
        if match := re.search(r"^version=(.+)$", file.read_text(errors="replace"), re.MULTILINE):
            return match[1].strip()
    return None


def _driver(machine: Machine) -> tuple[dict[str, Any], list[Problem]]:
    driver = machine.root / DRIVER
    nodes = machine.device_nodes()
    library = machine.library(DRIVER_LIBRARY, driver / "lib64/driver", driver / "lib64")
    tool = shutil.which("npu-smi", path=machine.environment.get("PATH"))
    info = driver / "version.info"
    match = re.search(r"(?i)^version=(.+)$", info.read_text(errors="replace"), re.M) if info.is_file() else None
    visible = machine.environment.get("ASCEND_RT_VISIBLE_DEVICES")
    facts = {
        "version": match[1].strip() if match else None,
        "library": library,
        "npu-smi": tool,
        "device_nodes": [str(node) for node in nodes],
        "visible_devices": visible,
    }
    closed = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    problems = []
    if library is None and (nodes or tool is None):
        what = f"the NPU driver is missing (no {DRIVER_LIBRARY}{'' if tool else ', no npu-smi'})"
        remedy = f"install Ascend's driver and firmware; in a container, mount /{DRIVER} of the host"
        problems.append(Problem("driver_missing", what, remedy))
    elif not nodes:
        remedy = "see `npu-smi info`; a container needs --device=/dev/davinci0 and davinci_manager, devmm_svm, hisi_hdc"
        problems.append(Problem("no_device", "the NPU driver is installed, but there is no /dev/davinci*", remedy))
    if closed:
        what = f"{closed[0]} may not be read and written by this user ({len(closed)} of {len(nodes)} devices)"
        problems.append(Problem("no_permission", what, f"add the user to the group {_group(closed[0])}, log in again"))
    if visible is not None and not _in_order(visible):
        what = f"ASCEND_RT_VISIBLE_DEVICES={visible!r} hides devices"
        problems.append(Problem("devices_hidden", what, "unset it, or give rising numbers without spaces, such as 0,1"))
    return facts, problems


def _in_order(visible: str) -> bool:
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        return False
    numbers = [int(number) for number in visible.split(",")]
    return all(first < second for first, second in pairwise(numbers))


def _group(node: Path) -> str:
    try:
        return node.group()
    except KeyError:  # the container does not know the host's groups
        return str(node.stat().st_gid)


def _load(machine: Machine) -> dict[str, Any]:
    """Import torch_npu and use a device, in another process: it may fail, hang or crash."""
    try:
        tried = subprocess.run(
            [sys.executable, "-m", __name__],
            env={**machine.environment, AUTOLOAD: "0"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"imported": False, "devices": [], "error": f"no answer within {SECONDS} s"}
    if tried.returncode == 0:
        return json.loads(tried.stdout.splitlines()[-1])
    lines = tried.stderr.strip().splitlines() or [f"exit status {tried.returncode}"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return {"imported": False, "devices": [], "error": (raised or lines)[-1]}


def _load_problems(loads: Mapping[str, Any], *, explained: bool, no_device: bool) -> list[Problem]:
    """What an attempt to use torch_npu adds to what was found without it: CANN (`explained`) or a device is missing."""
    error = loads["error"]
    if loads["imported"]:
        if no_device or (error is None and loads["devices"]):
            return []
        what = f"no NPU can be used ({error or 'torch.npu.device_count() is 0'})"
        return [Problem("no_device_free", what, "see `npu-smi info` for who holds the devices")]
    remedy = f"until that is mended, set {AUTOLOAD}=0 to use torch without NPUs"
    autoload = Problem("autoload", f"`import torch` fails, because it loads torch_npu by itself ({error})", remedy)
    if any(library in error for library in CANN_LIBRARIES):
        found = Problem("cann_missing", f"torch_npu finds no CANN ({error})", "source CANN's set_env.sh")
        return [autoload] if explained else [found, autoload]
    if DRIVER_LIBRARY in error:
        found = Problem("driver_missing", f"torch_npu finds no NPU driver ({error})", "install Ascend's driver")
        return [autoload] if no_device else [found, autoload]
    if "Two accelerators" in error:
        remedy = f"install torch's CPU build beside torch_npu, or set {AUTOLOAD}=0 to use the other device"
        return [Problem("two_accelerators", "torch also sees an accelerator of another kind", remedy), autoload]
    found = Problem("load_failed", f"torch_npu cannot be loaded ({error})", "install it and CANN again, as a pair")
    return [found, autoload]


def try_torch_npu() -> dict[str, Any]:
    """The NPUs' names, and what went wrong when each had to compute something."""
    import torch
    import torch_npu  # noqa: F401 (registers the NPU)

    devices, error = [], None
    try:
        for index in range(torch.npu.device_count()):  # type: ignore[attr-defined] # torch_npu puts it there
            devices.append(torch.npu.get_device_name(index))  # type: ignore[attr-defined] # the same
            torch.ones(2, device=f"npu:{index}").sum().item()
    except (RuntimeError, AssertionError) as reason:
        error = str(reason).strip().splitlines()[0]
    return {"imported": True, "devices": devices, "error": error}


def explain_failed_import(error: BaseException) -> NoReturn:
    """Say why `import torch` failed, where a device backend that it loads by itself is the reason.

    `hvt doctor` starts again without those backends, other `hvt` commands end with one line and status 2, and
    `import hvt_backbones` ends with an `ImportError` of one line.
    """
    match = re.search(r"Failed to load the backend extension: (\S+?)\.? ", str(error))
    if match is None:
        raise error
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(cause).split()) or type(cause).__name__
    message = (
        f"torch cannot be imported, because it loads {match[1]} by itself, which fails: {reason}. "
        f"Source CANN's set_env.sh, or set {AUTOLOAD}=0 to go without; `hvt doctor` says what is missing"
    )
    for program, command in pairwise([*sys.orig_argv, ""]):
        if Path(program).name in ("hvt", "hvt_backbones"):
            if command == "doctor":
                os.execve(sys.executable, sys.orig_argv, {**os.environ, AUTOLOAD: "0"})
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
    raise ImportError(message) from None


def report_npu(findings: dict[str, Any], width: int) -> list[str]:
    """The lines of `hvt doctor`'s NPU section."""
    package, cann, driver, loads = (findings[key] for key in ("torch_npu", "cann", "driver", "loads"))
    made_for = f"{package['version']} for torch {package['made_for_torch']}"
    found = cann["home"] or next((path for path in cann["libraries"].values() if path), None)
    rows = {
        "torch_npu": made_for if package["version"] else "not installed (needed for Ascend devices only)",
        "CANN": f"{cann['version'] or 'unknown version'}, {found}" if found else "not found",
        "driver": f"{driver['version'] or 'unknown version'}, {found}" if (found := driver["library"]) else "not found",
        "device nodes": ", ".join(driver["device_nodes"]) or "none",
    }
    if loads is not None:
        rows["usable"] = loads["error"] or ", ".join(loads["devices"]) or "none"
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]


if __name__ == "__main__":
    print(json.dumps(try_torch_npu()))
