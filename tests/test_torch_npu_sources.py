"""What we and accelerate call of torch_npu is there, as read from its sources: torch_npu is not imported here.

`TorchNpu` finds a name as Python would: a module's file, its assignments, functions, classes and imports, followed to
where they are defined. Our side is found by `calls`: `torch.npu.x(...)`, `torch_npu.x(...)` and
`torch.get_device_module(...).x(...)`, directly or through a variable that is assigned from `get_device_module` in the
same file. What these do not see: names built at run time (`getattr(torch, kind)`), devices that are passed on as
arguments, what torch itself calls (`torch.accelerator` goes through C++), and types, of which only the number and the
names of the arguments are checked.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

from hvt_backbones.device import DISTRIBUTED_BACKENDS
from hvt_backbones.npu_doctor import CANN_LIBRARIES, CANN_VARIABLES

from .conftest import ROOT

pytestmark = pytest.mark.slow  # not by its time, but `make test-fast` does without the download

OURS = [*sorted((ROOT / "hvt_backbones").rglob("*.py")), *sorted((ROOT / "classification").rglob("*.py"))]
# how a device module may be called where it is not a variable's name
MODULES = ("torch.npu", "torch_npu")


@lru_cache(maxsize=1)
def package() -> Distribution:
    """The torch_npu of `make test`, or the one that is installed."""
    aside = Path(sys.prefix) / "torch_npu_sources"
    found = next(iter(Distribution.discover(name="torch_npu", path=[str(aside)])), None)
    if found is not None:
        return found
    try:
        return distribution("torch_npu")
    except PackageNotFoundError:
        pytest.fail(f"torch_npu's sources are not in {aside}: run `make .venv/.torch_npu_sources`")


def folder() -> Path:
    return Path(package().locate_file("torch_npu"))


@lru_cache(maxsize=4)
def binary(name: str) -> bytes:
    return (folder() / "lib" / name).read_bytes()


# ---- what torch_npu has


@dataclass(frozen=True)
class Definition:
    """Where a name leads: "function", "class", "module", "value", or "extension" (in compiled code, not readable)."""

    kind: str
    module: str
    node: ast.AST | None = None

    def signature(self) -> inspect.Signature | None:
        """None where it is not in the sources: compiled code, and classes that inherit their constructor."""
        node = self.node
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
            return _signature(methods[0].args, skip=1) if methods else None
        return _signature(node.args) if isinstance(node, ast.FunctionDef) else None


def _signature(arguments: ast.arguments, skip: int = 0) -> inspect.Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parameters = []
    for index, argument in enumerate(positional[skip:], start=skip):
        only = index < len(arguments.posonlyargs)
        kind = inspect.Parameter.POSITIONAL_ONLY if only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = inspect.Parameter.empty if index < required else None
        parameters.append(inspect.Parameter(argument.arg, kind, default=default))
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else None
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=value))
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


class TorchNpu:
    """The package's files, by dotted name ("torch_npu.npu.memory")."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def file(self, module: str) -> Path | None:
        path = self.root.parent / module.replace(".", "/")
        return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)

    @cache  # noqa: B019 (one instance, as long as the tests)
    def names(self, module: str) -> dict[str, ast.AST | str]:
        """A module's names: the node that defines each, or the dotted name that it is imported from."""
        path = self.file(module)
        base = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found: dict[str, ast.AST | str] = {}
        for node in _top_level(ast.parse(path.read_text()).body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Import):
                found |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parent = ".".join(base.split(".")[: len(base.split(".")) - node.level + 1]) if node.level else ""
                source = ".".join(part for part in (parent, node.module) if part)
                for alias in node.names:
                    if alias.name == "*":
                        found |= {name: f"{source}.{name}" for name in self._exported(source)}
                    else:
                        found[alias.asname or alias.name] = f"{source}.{alias.name}"
        return found

    def _exported(self, module: str) -> list[str]:
        if self.file(module) is None:
            return []
        names = self.names(module)
        listed = names.get("__all__")
        return ast.literal_eval(listed.value) if listed else [name for name in names if not name.startswith("_")]

    def find(self, dotted: str) -> Definition | None:
        """The definition of "torch_npu.npu.empty_cache", or None."""
        if self.file(dotted) is not None:
            return Definition("module", dotted)
        module, _, name = dotted.rpartition(".")
        if module == "torch_npu._C" or module.startswith("torch_npu._C."):
            found = any(name.encode() in file.read_bytes() for file in self.root.glob("_C*.so"))
            return Definition("extension", module) if found or name.encode() in binary("libtorch_npu.so") else None
        if self.file(module) is None:
            return None
        node = self.names(module).get(name)
        if isinstance(node, str):
            return self.find(node) if node.startswith("torch_npu") and node != dotted else Definition("value", node)
        if node is None:
            return None
        kind = {ast.FunctionDef: "function", ast.ClassDef: "class"}.get(type(node), "value")
        return Definition(kind, module, node)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import, with those under `if` and `try`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from _top_level(getattr(node, part, []))


# ---- what is called


@dataclass(frozen=True)
class Use:
    """`torch_npu.npu.<...>` as some source file uses it; `call` where it is called."""

    name: str
    where: str
    call: ast.Call | None

    def fits(self, signature: inspect.Signature) -> str | None:
        """Why the call's arguments do not bind, or None."""
        positional = [argument for argument in self.call.args if not isinstance(argument, ast.Starred)]
        keywords = {keyword.arg: None for keyword in self.call.keywords if keyword.arg}
        complete = len(positional) == len(self.call.args) and len(keywords) == len(self.call.keywords)
        bind = signature.bind if complete else signature.bind_partial
        try:
            bind(*positional, **keywords)
        except TypeError as error:
            return str(error)
        return None


class Uses(ast.NodeVisitor):
    def __init__(self, where: str, tree: ast.Module) -> None:
        self.where, self.found, self.seen = where, [], set()
        assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
        self.variables = {
            target.id
            for node in assigned
            if _is_device_module(node.value)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        self._record(node.func, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._record(node, None)
        self.generic_visit(node)

    def _record(self, node: ast.AST, call: ast.Call | None) -> None:
        """The longest chain of names only: of `torch.npu.amp.GradScaler` no `torch.npu.amp`."""
        if id(node) in self.seen:
            return
        name = self._name(node)
        if name is not None:
            self.found.append(Use(name, f"{self.where}:{node.lineno}", call))
        while isinstance(node, ast.Attribute):
            self.seen.add(id(node))
            node = node.value

    def _name(self, node: ast.AST) -> str | None:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and (_is_device_module(node) or (isinstance(node, ast.Name) and node.id in self.variables)):
            return ".".join(("torch_npu.npu", *parts))
        if isinstance(node, ast.Name) and node.id == "torch" and parts[:1] == ["npu"] and len(parts) > 1:
            return ".".join(("torch_npu", *parts))
        if isinstance(node, ast.Name) and node.id == "torch_npu" and parts:
            return ".".join(("torch_npu", *parts))
        return None


def _is_device_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.get_device_module"


def uses(files: list[Path], root: Path) -> list[Use]:
    return [use for file in files for use in Uses(str(file.relative_to(root)), ast.parse(file.read_text())).found]


def complaints(sources: TorchNpu, found: list[Use]) -> list[str]:
    wrong = []
    for use in found:
        definition = sources.find(use.name)
        if definition is None:
            wrong.append(f"{use.where}: torch_npu has no {use.name.removeprefix('torch_npu.')}")
        elif use.call is not None and (signature := definition.signature()) is not None:
            if (reason := use.fits(signature)) is not None:
                wrong.append(f"{use.where}: {use.name}{signature}: {reason}")
        elif use.call is not None and definition.kind in ("module", "value"):
            wrong.append(f"{use.where}: {use.name} is a {definition.kind}, and called")
    return wrong


# ---- the tests


@pytest.fixture(scope="module")
def sources() -> TorchNpu:
    return TorchNpu(folder())


def test_the_package_is_the_one_for_our_torch() -> None:
    pins = dict(re.findall(r"^(torch\w*)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert package().version == pins["torch_npu"]
    assert f"__version__ = '{pins['torch_npu']}'" in (folder() / "version.py").read_text()
    assert any(re.fullmatch(rf"torch\s*==\s*{re.escape(pins['torch'])}(\+cpu)?", text) for text in package().requires)


def test_what_we_call_is_there(sources: TorchNpu) -> None:
    found = uses(OURS, ROOT)
    assert {"torch_npu.npu.device_count", "torch_npu.npu.get_device_properties"} <= {use.name for use in found}
    assert complaints(sources, found) == []


def test_what_accelerate_calls_is_there(sources: TorchNpu) -> None:
    root = Path(distribution("accelerate").locate_file("accelerate"))
    files = [file for file in sorted(root.rglob("*.py")) if "test_utils" not in file.parts]
    found = uses(files, root)
    assert {"torch_npu.npu.manual_seed_all", "torch_npu.npu.amp.GradScaler"} <= {use.name for use in found}
    assert complaints(sources, found) == []


def test_what_torch_amp_asks_of_a_device_is_there(sources: TorchNpu) -> None:
    """torch.amp.autocast refuses a device module that lacks these."""
    for name in ("get_amp_supported_dtype", "is_autocast_enabled", "set_autocast_enabled"):
        assert sources.find(f"torch_npu.npu.{name}").kind == "function"


WRONG = {
    "no_such_name": ("torch.npu.empty_cash()", "has no npu.empty_cash"),
    "no_such_module": ("torch_npu.nqu.empty_cache()", "has no nqu.empty_cache"),
    "too_many": ("torch.npu.empty_cache(1)", "too many positional arguments"),
    "no_such_keyword": ("torch.npu.manual_seed_all(sead=1)", "sead|missing"),
    "too_few": ("torch.npu.set_rng_state(device='npu')", "missing"),
    "by_variable": ("api = torch.get_device_module(d)\napi.max_memory_allocated(0, 1)", "too many"),
    "direct": ("torch.get_device_module(d).get_rng_state(0, 1)", "too many"),
    "not_called": ("count = torch.npu.device_counts", "has no npu.device_counts"),
    "a_module": ("torch.npu.amp()", "is a module"),
    "class": ("torch.npu.amp.GradScaler(initial_scale=2.0)", "initial_scale"),
}
RIGHT = """
torch.npu.set_rng_state(state, device="npu:1")
torch.npu.mem_get_info(0)[0]
torch.npu.mem_get_info(*arguments)
torch.npu.amp.GradScaler(**kwargs)
api = torch.get_device_module(device)
api.max_memory_allocated(device) / 2**30
api.Stream
torch.cuda.no_such_name()
"""


@pytest.mark.parametrize(("code", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_found(code: str, reason: str, sources: TorchNpu) -> None:
    (wrong,) = complaints(sources, Uses("example.py", ast.parse(code)).found)
    assert re.search(reason, wrong)
    assert wrong.startswith(f"example.py:{len(code.splitlines())}: ")


def test_right_calls_pass(sources: TorchNpu) -> None:
    found = Uses("example.py", ast.parse(RIGHT)).found
    assert [use.name.removeprefix("torch_npu.npu.") for use in found] == [
        *["set_rng_state", "mem_get_info", "mem_get_info", "amp.GradScaler", "max_memory_allocated", "Stream"]
    ]
    assert complaints(sources, found) == []


def test_compiled_names_are_told_as_such(sources: TorchNpu) -> None:
    assert sources.find("torch_npu._C._npu_getDeviceCount") == Definition("extension", "torch_npu._C")
    assert sources.find("torch_npu._C._npu_getDeviceCounts") is None


def test_torch_loads_it_by_itself(sources: TorchNpu) -> None:
    (entry,) = [entry for entry in package().entry_points if entry.group == "torch.backends"]
    assert (entry.name, entry.value) == ("torch_npu", "torch_npu:_autoload")
    assert sources.find("torch_npu._autoload").kind == "function"


def test_the_device_is_npu_and_its_backend_hccl(sources: TorchNpu) -> None:
    registered = {
        (ast.unparse(node.func), node.args[0].value)
        for file in (sources.root / "_init").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    }
    assert ("torch.utils.rename_privateuse1_backend", "npu") in registered
    assert ("torch._register_device_module", "npu") in registered
    assert ("torch.distributed.Backend.register_backend", DISTRIBUTED_BACKENDS["npu"]) in registered


def test_fused_adamw_is_implemented() -> None:
    assert b"_fused_adamw_\0" in binary("libtorch_npu.so")
    assert torch._C._get_privateuse1_backend_name() in torch.utils._foreach_utils._get_fused_kernels_supported_devices()


def test_the_doctor_looks_for_the_libraries_that_it_needs() -> None:
    strings = binary("libtorch_npu.so")
    for name in (*CANN_LIBRARIES, CANN_VARIABLES[0]):
        assert name.encode() + b"\0" in strings, name


def test_the_doctor_explains_the_real_package_without_cann(tmp_path: Path) -> None:
    """In a process of its own, where torch finds torch_npu and torch_npu finds no CANN."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment |= {"PYTHONPATH": f"{ROOT}:{folder().parent}", "LD_LIBRARY_PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hvt_backbones", "doctor", "--json"]
    answer = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    findings = json.loads(answer.stdout)["npu"]
    assert findings["torch_npu"]["version"] == package().version
    assert findings["loads"]["error"]
    assert "autoload" in [problem["name"] for problem in findings["problems"]]


def test_the_variables_of_the_readme_are_named_in_it(sources: TorchNpu) -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (torch_npu|CANN) \|", (ROOT / "classification/npu/README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 12
    texts = [file.read_bytes() for file in sources.root.rglob("*.py")]
    for name, origin in rows:
        named = name.encode() in binary("libtorch_npu.so") or any(name.encode() in text for text in texts)
        assert named == (origin == "torch_npu"), name
