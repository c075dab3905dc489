"""`hvt doctor` on machines with an Ascend NPU that lack something: simulated with files, variables and packages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from hvt_backbones import InputError, npu_doctor
from hvt_backbones.cli import main
from hvt_backbones.device import select_device
from hvt_backbones.npu_doctor import CANN_LIBRARIES, Machine, examine_npu

from .conftest import ROOT

NO_HCCL = "libhccl.so: cannot open shared object file: No such file or directory"
TORCH = re.match(r"[\d.]*\d", version("torch"))[0]


def install_torch_npu(folder: Path, code: str, made_for: str = TORCH) -> Path:
    """A package as pip would leave it, with torch_npu's entry point, that runs `code` when it is imported."""
    (folder / "torch_npu").mkdir(parents=True)
    # the real one turns the switch off before all else, and on again only where it has got to its end
    (folder / "torch_npu" / "__init__.py").write_text(
        f"import os\nos.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'\n{code}\n\ndef _autoload():\n    pass\n"
    )
    described = folder / f"torch_npu-{made_for}.post3.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {made_for}.post3\nRequires-Dist: torch =={made_for}+cpu\n"
    )
    (described / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def variables(**changes: object) -> dict[str, str]:
    """This process's, without what a real NPU's machine sets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "TORCH_DEVICE"))}
    return {**kept, "LD_LIBRARY_PATH": "", "PATH": "/nowhere", "HOME": "/nowhere", **changes}


# ---- what can be found without torch_npu


class FakeMachine:
    """A root folder and variables that grow by what is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variables: dict[str, str] = {"HOME": str(root / "home"), "PATH": str(root / "bin")}

    def file(self, name: str, text: str = "") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def cann(self, *, set_up: bool = True, libraries: tuple[str, ...] = CANN_LIBRARIES) -> FakeMachine:
        home = self.root / "usr/local/Ascend/ascend-toolkit/latest"
        self.file("usr/local/Ascend/ascend-toolkit/set_env.sh")
        self.file(str(home / "x86_64-linux/ascend_toolkit_install.info"), "package_name=toolkit\nversion=8.5.0\n")
        for name in libraries:
            self.file(str(home / "lib64" / name))
        if set_up:
            self.variables |= {"ASCEND_HOME_PATH": str(home), "LD_LIBRARY_PATH": f"/nowhere:{home / 'lib64'}"}
        return self

    def driver(self, *, devices: int = 2) -> FakeMachine:
        self.file("usr/local/Ascend/driver/lib64/driver/libascend_hal.so")
        self.file("usr/local/Ascend/driver/version.info", "Version=25.2.0\n")
        self.file("bin/npu-smi").chmod(0o755)
        return self.devices(devices)

    def devices(self, count: int) -> FakeMachine:
        for index in range(count):
            self.file(f"dev/davinci{index}")
        self.file("dev/davinci_manager")
        return self

    def set(self, **variables: str) -> FakeMachine:
        self.variables |= variables
        return self

    def examine(self, *, wanted: bool = False) -> dict:
        return examine_npu(Machine(self.root, self.variables), wanted=wanted)


STATES: dict[str, tuple[Callable[[FakeMachine], object], dict[str, str]]] = {
    "nothing": (
        lambda machine: machine,
        {"cann_missing": "install the CANN toolkit", "driver_missing": "install Ascend's driver"},
    ),
    "all": (lambda machine: machine.cann().driver(), {}),
    "no_cann": (lambda machine: machine.driver(), {"cann_missing": "install the CANN toolkit"}),
    "cann_not_sourced": (
        lambda machine: machine.cann(set_up=False).driver(),
        {"cann_not_set_up": "source ROOT/usr/local/Ascend/ascend-toolkit/set_env.sh"},
    ),
    "cann_gone": (
        lambda machine: machine.driver().set(ASCEND_TOOLKIT_HOME="/nowhere/cann"),
        {"cann_missing": "source the set_env.sh of the CANN that is installed"},
    ),
    "cann_half": (
        lambda machine: machine.cann(libraries=CANN_LIBRARIES[:1]).driver(),
        {"cann_incomplete": "install the CANN toolkit again"},
    ),
    "no_driver": (lambda machine: machine.cann(), {"driver_missing": "install Ascend's driver and firmware"}),
    "driver_not_in_container": (lambda machine: machine.cann().devices(1), {"driver_missing": "mount /usr/local"}),
    "no_device": (lambda machine: machine.cann().driver(devices=0), {"no_device": "--device=/dev/davinci0"}),
    "hidden": (
        lambda machine: machine.cann().driver().set(ASCEND_RT_VISIBLE_DEVICES="1,0"),
        {"devices_hidden": "rising numbers"},
    ),
    "hidden_by_a_space": (
        lambda machine: machine.cann().driver().set(ASCEND_RT_VISIBLE_DEVICES="0, 1"),
        {"devices_hidden": "without spaces"},
    ),
    "some_visible": (lambda machine: machine.cann().driver().set(ASCEND_RT_VISIBLE_DEVICES="0,1"), {}),
}


@pytest.mark.parametrize(("build", "expected"), STATES.values(), ids=STATES)
def test_each_lack_has_its_own_message_and_remedy(
    build: Callable[[FakeMachine], object], expected: dict[str, str], tmp_path: Path
) -> None:
    machine = FakeMachine(tmp_path)
    build(machine)
    problems = {problem["name"]: problem for problem in machine.examine(wanted=True)["problems"]}
    assert "torch_npu" in problems.pop("torch_npu_missing")["what"]
    assert set(problems) == set(expected)
    for name, remedy in expected.items():
        assert remedy.replace("ROOT", str(tmp_path)) in problems[name]["remedy"]


def test_a_machine_without_a_hint_of_an_npu_is_left_in_peace(tmp_path: Path) -> None:
    findings = FakeMachine(tmp_path).examine()
    assert findings["problems"] == []
    assert findings["torch_npu"]["version"] is None
    assert findings["loads"] is None


@pytest.mark.parametrize("hint", ["device", "variable"])
def test_a_device_or_cann_makes_a_missing_torch_npu_a_warning(hint: str, tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    _ = machine.devices(1) if hint == "device" else machine.set(ASCEND_HOME_PATH=str(tmp_path))
    assert "torch_npu_missing" in [problem["name"] for problem in machine.examine()["problems"]]


def test_the_facts_are_those_of_the_files(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path).cann().driver(devices=11)
    findings = machine.examine()
    assert findings["cann"]["version"] == "8.5.0"
    assert set(findings["cann"]["libraries"]) == set(CANN_LIBRARIES)
    assert findings["driver"]["version"] == "25.2.0"
    assert findings["driver"]["npu-smi"] == str(tmp_path / "bin/npu-smi")
    nodes = [Path(node).name for node in findings["driver"]["device_nodes"]]
    assert nodes == [f"davinci{index}" for index in range(11)]  # by number, and without davinci_manager


def test_devices_of_another_group_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine(tmp_path).cann().driver()
    (tmp_path / "dev/davinci1").chmod(0)
    # the superuser, who may run the tests, may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).stat().st_mode & 0o600 == 0o600)
    (problem,) = [problem for problem in machine.examine()["problems"] if problem["name"] == "no_permission"]
    assert "dev/davinci1 may not be read" in problem["what"]
    assert "(1 of 2 devices)" in problem["what"]
    assert (tmp_path / "dev/davinci1").group() in problem["remedy"]


# ---- torch_npu is installed


WORKING = """
import torch
from types import SimpleNamespace
torch.npu = SimpleNamespace(device_count=lambda: {count}, get_device_name=lambda index: "Ascend910B")
ones = torch.ones
torch.ones = lambda size, device: {compute}
"""
COMPUTES = "ones(size)"
BUSY = "(_ for _ in ()).throw(RuntimeError('error code is 507033'))"
LOADS = {
    "works": (WORKING.format(count=2, compute=COMPUTES), []),
    "no_device": (WORKING.format(count=0, compute=COMPUTES), ["no_device_free"]),
    "busy": (WORKING.format(count=1, compute=BUSY), ["no_device_free"]),
    "no_cann": (f"raise ImportError({NO_HCCL!r})", ["cann_missing", "autoload"]),
    "no_driver": (f"raise ImportError({NO_HCCL.replace('hccl', 'ascend_hal')!r})", ["driver_missing", "autoload"]),
    "cuda_too": (
        "raise RuntimeError('Two accelerators cannot be used at the same time: npu and cuda.\\n[ERROR] ERR00007')",
        ["two_accelerators", "autoload"],
    ),
    "broken": ("raise ImportError('undefined symbol: _ZN3c10')", ["load_failed", "autoload"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "expected"), LOADS.values(), ids=LOADS)
def test_torch_npu_is_tried_in_a_process_of_its_own(
    code: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install_torch_npu(tmp_path / "site", code)
    monkeypatch.syspath_prepend(site)
    machine = FakeMachine(tmp_path).cann().driver().set(PYTHONPATH=f"{ROOT}:{site}")
    findings = machine.examine()
    assert findings["torch_npu"]["made_for_torch"] == TORCH
    assert [problem["name"] for problem in findings["problems"]] == expected
    if expected:
        assert code == LOADS["no_device"][0] or findings["loads"]["error"]
    else:
        assert findings["loads"]["devices"] == ["Ascend910B", "Ascend910B"]
    assert "torch_npu" not in sys.modules


def test_a_torch_npu_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = install_torch_npu(tmp_path / "site", "import time; time.sleep(60)")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(npu_doctor, "SECONDS", 0.5)
    problems = FakeMachine(tmp_path).cann().driver().set(PYTHONPATH=f"{ROOT}:{site}").examine()["problems"]
    assert "no answer within 0.5 s" in problems[0]["what"]


def test_a_torch_npu_for_another_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install_torch_npu(tmp_path, "", made_for="2.1.0"))
    facts, (problem,) = npu_doctor._package()
    assert facts["version"] == "2.1.0.post3"
    assert problem.name == "torch_mismatch"
    assert f"is made for torch 2.1.0, and torch {version('torch')} is installed" in problem.what


def test_a_version_without_a_number_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install_torch_npu(tmp_path, "", made_for="nightly"))
    assert npu_doctor._package()[0]["made_for_torch"] == "nightly.post3"


# ---- torch loads it by itself, and fails


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = variables(PYTHONPATH=f"{ROOT}:{site}", OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, cwd=site)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return install_torch_npu(tmp_path, f"raise ImportError({NO_HCCL!r})")


def test_such_an_installation_does_break_torch(broken: Path) -> None:
    tried = run(broken, "-c", "import torch")
    assert tried.returncode == 1
    assert "Failed to load the backend extension: torch_npu" in tried.stderr


@pytest.mark.slow
def test_the_doctor_explains_the_autoload_that_breaks_torch(broken: Path) -> None:
    answers = [run(broken, "-m", "hvt_backbones", "doctor", *form) for form in ((), ("--json",))]
    assert [answer.returncode for answer in answers] == [0, 0]
    assert [answer.stderr for answer in answers] == ["", ""]
    findings = json.loads(answers[1].stdout)
    problems = {problem["name"]: problem for problem in findings["npu"]["problems"]}
    assert set(problems) == {"cann_missing", "driver_missing", "autoload"}
    assert NO_HCCL in problems["autoload"]["what"]
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in problems["autoload"]["remedy"]
    for problem in problems.values():
        line = f"NPU: {problem['what']}: {problem['remedy']}"
        assert line in findings["warnings"]
        assert f"  {line}\n" in answers[0].stdout + "\n"


@pytest.mark.slow
def test_other_commands_and_the_import_say_it_in_one_line(broken: Path) -> None:
    command = run(broken, "-m", "hvt_backbones", "models")
    assert command.returncode == 2
    assert command.stdout == ""
    assert re.fullmatch(rf"error: torch cannot be imported, .*{NO_HCCL}.*`hvt doctor`.*\n", command.stderr)
    imported = run(broken, "-c", "import hvt_backbones")
    assert imported.returncode == 1
    assert imported.stderr.splitlines()[-1] == "ImportError" + command.stderr.rstrip().removeprefix("error")
    assert "Failed to load" not in imported.stderr


def test_a_device_that_cannot_be_loaded_is_an_input_error(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(broken)
    with pytest.raises(InputError, match="torch_npu cannot be loaded: libhccl.so.*hvt doctor"):
        select_device("npu")
    assert select_device("auto").type in ("cpu", "cuda")  # what torch did not load by itself is left alone
    assert "torch_npu" not in sys.modules


def test_the_doctor_lists_what_is_missing_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--npu", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["npu"]
    assert main(["doctor", "--json"]) == 0
    unasked = json.loads(capsys.readouterr().out)["npu"]
    assert {key: asked[key] for key in ("torch_npu", "cann", "driver")} == {
        key: unasked[key] for key in ("torch_npu", "cann", "driver")
    }
    names = [problem["name"] for problem in asked["problems"]]
    assert ("torch_npu_missing" in names) == (asked["torch_npu"]["version"] is None)
