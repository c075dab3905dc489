"""Reading and writing weight files: every format that loads, and a message of its own for each that does not."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import stat
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hvt_backbones.errors import InputError, WeightsError
from hvt_backbones.weights.files import find_weights, read_weights, save_state_dict
from tests.full_disk import file_size_limit


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "norm.weight": torch.randn(8, generator=generator),
        "head.weight": torch.randn(5, 8, generator=generator).half(),
        "steps": torch.tensor(3),
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected) or sorted(actual) == sorted(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


# ---- what loads


def test_reads_safetensors_whatever_the_suffix(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.bin")
    assert_same(read_weights(tmp_path / "model.bin").tensors, tensors)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_reads_torch_files(tmp_path: Path, tensors: dict[str, Tensor], zipped: bool) -> None:
    torch.save(tensors, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    assert_same(read_weights(str(tmp_path / "model.pth")).tensors, tensors)


WRAPPINGS: dict[str, Callable[[dict], dict]] = {
    "model": lambda t: {"model": t, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "state_dict": lambda t: {"meta": {"epoch": 3}, "state_dict": t},
    "model_ema": lambda t: {"model_ema": t, "model": None},
    "state_dict_ema": lambda t: {"state_dict_ema": t},
    "module": lambda t: {"module": t},
    "nested": lambda t: {"state_dict": {"model": t}, "loss": torch.tensor(0.5)},
    "before_the_average": lambda t: {"model_ema": {"norm.weight": torch.zeros(8)}, "model": t},
    "parameters": lambda t: {
        "model": {n: torch.nn.Parameter(x, requires_grad=x.is_floating_point()) for n, x in t.items()}
    },
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_unwraps(tmp_path: Path, tensors: dict[str, Tensor], wrap: Callable[[dict], dict]) -> None:
    torch.save(wrap(tensors), tmp_path / "model.pth")
    actual = read_weights(tmp_path / "model.pth").tensors
    assert_same(actual, tensors)
    assert not any(tensor.requires_grad for tensor in actual.values())


def test_key_chooses_among_several(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    average = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"model": tensors, "teacher": {"model": average}}, tmp_path / "model.pth")
    assert_same(read_weights(tmp_path / "model.pth", "teacher").tensors, average)
    with pytest.raises(WeightsError, match=r"no weights under 'student': choose .* among 'model', 'teacher.model'"):
        read_weights(tmp_path / "model.pth", "student")


@pytest.fixture
def training_code(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Objects as training code leaves them in checkpoints, of classes that exist only while the file is written."""

    class CfgNode(dict):
        pass

    class HistoryBuffer:
        pass

    for module, cls in (("yacs.config", CfgNode), ("mmengine.logging.history_buffer", HistoryBuffer)):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        for parent in (module.split(".")[0], module.rpartition(".")[0], module):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], cls.__name__, cls)
    config = CfgNode(MODEL=CfgNode(TYPE="swin", DROP_PATH_RATE=0.2))
    config.__dict__["__immutable__"] = True
    history = HistoryBuffer()
    history.values = np.arange(3.0)
    return {
        "config": config,
        "message_hub": {"loss": history},
        "args": argparse.Namespace(lr=1e-3, output=Path("out"), sizes=[7, 7]),
        "max_accuracy": np.float64(81.2),
        "cfg": np.array([1, 2]),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_settings_beside_the_weights_need_no_package(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    training_code: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    zipped: bool,
) -> None:
    torch.save({"model": tensors, **training_code}, tmp_path / "swin.pth", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.split(".")[0] in ("yacs", "mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    before = set(torch.serialization.get_safe_globals())
    assert_same(read_weights(tmp_path / "swin.pth").tensors, tensors)
    assert set(torch.serialization.get_safe_globals()) == before


# ---- what does not


class Payload:
    """A pickle that runs a command when it is read in full."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def write_payload(path: Path, marker: Path, form: str) -> None:
    content = {"model": {"weight": torch.ones(2)}, "extra": Payload(marker)}
    if form.startswith("bare"):
        path.write_bytes(pickle.dumps(content["extra"], protocol=int(form[-1])))
    else:
        protocol = 4 if form == "zip_protocol_4" else 2
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy", pickle_protocol=protocol)


@pytest.mark.parametrize("form", ["zip", "zip_protocol_4", "legacy", "bare_2", "bare_4"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    write_payload(path, marker, form)
    with pytest.raises(WeightsError, match=r"needs the code of 'posix.system'.*model\.state_dict\(\)"):
        read_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if form != "bare_2" and form != "bare_4" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the payload works where code may run, so that its refusal proves something"


class Custom(torch.nn.Module):
    pass


FOREIGN = [Custom(), torch.nn.Sequential(), collections.deque()]


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
def test_what_is_no_tensor_is_refused_by_name(value: object, tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "args": argparse.Namespace(lr=0.1), "model": value}, tmp_path / "model.pth")
    name = rf"\S*\.{type(value).__name__}"
    with pytest.raises(WeightsError, match=rf"needs the code of '{name}' to be read, which is refused"):
        read_weights(tmp_path / "model.pth")


def test_tensors_in_another_pickle_protocol(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, tmp_path / "model.pth", pickle_protocol=4)
    with pytest.raises(WeightsError, match=r"save it again by torch\.save"):
        read_weights(tmp_path / "model.pth")


def safetensors_bytes(folder: Path) -> bytes:
    save_file({"weight": torch.ones(100)}, folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


def torch_bytes(folder: Path, zipped: bool) -> bytes:
    torch.save({"weight": torch.ones(5000)}, folder / "whole.pth", _use_new_zipfile_serialization=zipped)
    return (folder / "whole.pth").read_bytes()


def zip_bytes(folder: Path, name: str) -> bytes:
    with zipfile.ZipFile(folder / "made.zip", "w") as archive:
        archive.writestr(name, b"content")
    return (folder / "made.zip").read_bytes()


GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
BROKEN: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "zero_bytes": ("w.pth", lambda _: b"", r"is empty \(zero bytes\): copy or download it again"),
    "safetensors_cut": ("w.safetensors", lambda d: safetensors_bytes(d)[:-7], r"truncated or damaged \(\d+ bytes; "),
    "safetensors_header_cut": (
        "w.safetensors",
        lambda d: safetensors_bytes(d)[:20],
        r"truncated or damaged \(20 bytes; ",
    ),
    "safetensors_tiny": ("w.safetensors", lambda _: b"\x01\x02", r"truncated or damaged \(2 bytes; "),
    "zip_cut": (
        "w.pth",
        lambda d: torch_bytes(d, True)[:-100],
        r"truncated or damaged .*the end of the archive is missing",
    ),
    "legacy_cut": ("w.pth", lambda d: torch_bytes(d, False)[:-100], r"truncated or damaged .*unexpected EOF"),
    "legacy_cut_early": ("w.pth", lambda d: torch_bytes(d, False)[:60], r"truncated or damaged"),
    "zip_garbled": ("w.pth", lambda d: torch_bytes(d, True).replace(b"weight", b"\xff\xff\xff\xff\xff\xff"), "damaged"),
    "web_page": ("w.pth", lambda _: b"\n<!DOCTYPE html><html>Sign in</html>", r"is a web page, not weights"),
    "text": (
        "w.pth",
        lambda _: b'{"weight_map": {"a": "b"}}',
        r"is text, not weights \(it starts with '\{\"weight_map",
    ),
    "git_lfs": ("w.safetensors", lambda _: GIT_LFS, r"is a git-lfs pointer.*git lfs pull"),
    "gzip": ("w.pth", lambda _: b"\x1f\x8b\x08\x00\x00", r"is a compressed archive: unpack it"),
    "other_zip": ("w.pth", lambda d: zip_bytes(d, "model.pth"), r"is a zip archive without weights.*unpack it"),
    "torchscript": ("w.pth", lambda d: zip_bytes(d, "model/constants.pkl"), r"is a TorchScript program"),
    "noise": ("w.pth", lambda _: bytes(range(256)), r"is neither safetensors nor a file of torch\.save"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path: Path, name: str, content: Callable[[Path], bytes], message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content(tmp_path))
    with pytest.raises(WeightsError, match=message) as raised:
        read_weights(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nothing\.pth does not exist: check the path"):
        read_weights(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=r"is a folder: pass the weights file in it"):
        read_weights(tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may read everything, so the refusal is made
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.pth").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match=r"cannot be read \(Permission denied\): check its permissions"):
        read_weights(tmp_path / "model.pth")


WITHOUT_TENSORS = {
    "numbers": ({"epoch": 3, "lr": 0.1}, r"holds no tensors \(its keys are 'epoch', 'lr'\)"),
    "list": ([torch.ones(1)], r"holds no tensors: give a model's state_dict\(\)"),
    "tensor": (torch.ones(1), r"holds no tensors: give a model's"),
    "empty": ({}, r"holds no tensors"),
    "elsewhere": (
        {"teacher": {"w": torch.ones(1)}, "epoch": 1},
        r"no tensors at its top level: choose weights_key= among 'teacher'",
    ),
}


@pytest.mark.parametrize(("content", "message"), WITHOUT_TENSORS.values(), ids=WITHOUT_TENSORS.keys())
def test_no_tensors(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "model.pth")


TRAINED, AVERAGE = {"norm.weight": torch.zeros(2)}, {"norm.weight": torch.ones(2)}
BOTH = {"state_dict_ema": AVERAGE, "state_dict": TRAINED}
FSDP = {"state": {"norm.weight": {"exp_avg": torch.ones(2)}}}
# content, weights_key, the tensors that are taken, their key and the others
SETS = {
    "below a wrapper": ({"model": BOTH}, None, TRAINED, "model.state_dict", ("model.state_dict_ema",)),
    "a path": ({"model": BOTH}, "model.state_dict_ema", AVERAGE, "model.state_dict_ema", ("model.state_dict",)),
    "above a choice": ({"a": BOTH, "model": AVERAGE}, "a", TRAINED, "a.state_dict", ("a.state_dict_ema", "model")),
    "beside the average": ({**TRAINED, "model_ema": AVERAGE}, None, TRAINED, None, ("model_ema",)),
    "the average beside": ({**TRAINED, "model_ema": AVERAGE}, "model_ema", AVERAGE, "model_ema", ()),
    "beside what is known": ({**TRAINED, "model": AVERAGE}, None, TRAINED, None, ("model",)),
    "an optimiser": ({"model": TRAINED, "optimizer": FSDP}, None, TRAINED, "model", ()),
    "a generator": ({"model": TRAINED, "rng_state": torch.ones(2), 0: torch.ones(2)}, None, TRAINED, "model", ()),
}


@pytest.mark.parametrize(("content", "key", "taken", "path", "others"), SETS.values(), ids=SETS.keys())
def test_sets_of_tensors(content: dict, key: str | None, taken: dict, path: str | None, others: tuple, caplog) -> None:
    found = find_weights(content, key)
    assert_same(found.tensors, taken)
    assert (found.key, found.others) == (path, others)
    assert ("weights_key chooses" in caplog.text) == (path != key if key else bool(others))


@pytest.mark.parametrize("names", [("params", "params_ema"), ("student", "teacher"), ("ema_state_dict",)], ids=str)
def test_sets_under_unknown_names_are_named(names: tuple[str, ...]) -> None:
    listed = ", ".join(map(repr, names))
    with pytest.raises(WeightsError, match=f"no tensors at its top level: choose weights_key= among {listed}$"):
        find_weights(dict.fromkeys(names, TRAINED))


# ---- writing


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_saves_and_reads_back(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    shared = dict(
        tensors, tied=tensors["norm.weight"], view=tensors["head.weight"].t(), part=tensors["norm.weight"][:2]
    )
    path = save_state_dict(shared, tmp_path / "new" / "folder" / name, {"model": "swin_tiny"})
    assert_same(read_weights(path).tensors, shared)
    assert read_weights(path).metadata == {"model": "swin_tiny"}
    assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_saved_files_have_the_usual_permissions(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    (tmp_path / "usual").touch()
    path = save_state_dict(tensors, tmp_path / name)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_saving_over_the_file_that_was_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = save_state_dict(tensors, tmp_path / "model.pth")
    mapped = read_weights(path).tensors
    save_state_dict({"only": torch.ones(1)}, path)
    assert_same(mapped, tensors)
    assert list(read_weights(path).tensors) == ["only"]


def test_metadata_of_other_files_is_empty(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"meta": [1], "state_dict": tensors}, tmp_path / "model.pth")
    assert read_weights(tmp_path / "model.safetensors").metadata == read_weights(tmp_path / "model.pth").metadata == {}


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_disk_full_while_writing_keeps_the_old_file(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    path = save_state_dict(tensors, tmp_path / name)
    expected = rf"^{path} was not written \(writing stopped early\): free 400000 bytes there or choose another folder$"
    with file_size_limit(100_000), pytest.raises(InputError, match=expected):
        save_state_dict({"large": torch.ones(100_000)}, path)
    assert_same(read_weights(path).tensors, tensors)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_too_little_room_is_seen_before_writing(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10))
    with pytest.raises(InputError, match=r"\(No space left on device\): free 120 bytes there or choose another folder"):
        save_state_dict(tensors, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"was not written \((Not a directory|File exists)\): choose a folder you can"):
        save_state_dict(tensors, tmp_path / "file" / "model.safetensors")
    (tmp_path / "model.pth").mkdir()
    with pytest.raises(InputError, match=r"is a folder: give the name of a file"):
        save_state_dict(tensors, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"cannot tell the format .*\.safetensors or one of \.pth"):
        save_state_dict(tensors, tmp_path / "model.ckpt")
