"""Weight files on the disk: read without running code, written whole or not at all.

Only tensors are taken from a file. safetensors files cannot hold anything else; pickles written by `torch.save` go
through PyTorch's restricted reader (`weights_only=True`), in which the few harmless classes that published
checkpoints carry beside their weights (settings, logged numbers) are replaced by inert placeholders.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from ..atomic import whole_file
from ..errors import InputError, WeightsError
from .report import shown, some

# Keys under which training code stores the mapping of tensors, the first found wins; tensors beside them come before
# all. The trained weights come before their moving average, so that a checkpoint that holds both is read the same way
# as one that holds only the first.
WRAPPER_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema", "module")

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")

GIT_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
HEAD_BYTES = 1024
LEGACY_PICKLES = 5  # in a file of `torch.save` before its zip format: the content is the fourth
GETATTR = "builtins.getattr"
# the classes and functions that PyTorch's restricted reader knows itself
OF_TENSORS = re.compile(
    r"torch\.(\w+|(_utils|_tensor|storage|serialization|nn\.parameter)\.\w+|(\w+\.)+\w+(Storage|Tensor))"
    r"|collections\.\w+|_codecs\.encode|builtins\.(bytearray|complex|set)"
)
logger = logging.getLogger(__name__)


class _Placeholder:
    """Stands for an object whose content is not needed: takes any arguments and state, keeps none, runs nothing."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PlaceholderMapping:
    """The same for classes derived from dict: PyTorch's reader fills an OrderedDict, but no other subclass of dict."""

    def __new__(cls, *args: object) -> OrderedDict:  # type: ignore[misc]  # another class is the point of it
        return OrderedDict()


class _HistoryBuffer(_Placeholder):
    """MMEngine's log of a number."""


def _history_method(owner: object, name: object) -> None:
    """For the `getattr` with which MMEngine's logs name their statistics, and for no other: it reaches anything."""
    if owner is not _HistoryBuffer or name not in ("mean", "max", "min", "current"):
        raise pickle.UnpicklingError(f"{GETATTR} of {owner!r}, {name!r}")


_PLACEHOLDERS: dict[Callable[..., Any], tuple[str, ...]] = {
    _Placeholder: (
        "argparse.Namespace",  # PVT, Twins, timm
        "pathlib.PosixPath",  # a value in such a namespace
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "pathlib._local.WindowsPath",
        "numpy.dtype",  # numbers among the metrics
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "builtins.dict",  # factories of a defaultdict
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "builtins.slice",
    ),
    _HistoryBuffer: ("mmengine.logging.history_buffer.HistoryBuffer",),
    _history_method: (GETATTR,),
    _PlaceholderMapping: (
        "yacs.config.CfgNode",  # Swin
        "collections.defaultdict",
        "addict.addict.Dict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
    ),
}
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (stand_in, name) for stand_in, names in _PLACEHOLDERS.items() for name in names
]


@dataclass(frozen=True)
class FoundWeights:
    """Weights in the content of a file, and what it says about them.

    Attributes:
        tensors: name -> tensor.
        key: the keys that lead there, with dots between; None where the tensors lay at the top.
        others: the keys that lead to the other sets.
        meta: the text entries of a safetensors file; what a file of `torch.save` holds under `meta`.
    """

    tensors: dict[str, Tensor]
    key: str | None
    others: tuple[str, ...]
    meta: Mapping[str, Any]

    @property
    def metadata(self) -> dict[str, str]:
        """The text entries that `save_state_dict` stored with the weights; empty where there are none."""
        return {name: text for name, text in self.meta.items() if isinstance(name, str) and isinstance(text, str)}

    @property
    def classes(self) -> dict[str, Any]:
        """What OpenMMLab stored about the classes, "classes" and "palette", as far as it is plain data."""
        # before MMEngine the names were written in capitals
        older = {key.lower(): self.meta[key] for key in ("CLASSES", "PALETTE") if key in self.meta}
        classes = self.meta.get("dataset_meta", older)
        if not isinstance(classes, Mapping):
            return {}
        return {key: value for key, value in classes.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float)


def read_weights(path: str | os.PathLike, key: str | None = None) -> FoundWeights:
    """Read the mapping of names to tensors from a safetensors file or from a file of `torch.save`, on the CPU.

    The mapping may lie at the top of the file or, at any depth, under one of `WRAPPER_KEYS`; of the entries beside it
    (optimiser, settings, epoch) only `meta` is kept. Files of the zip format are mapped into memory, so that the others
    cost nothing.

    Args:
        path: the file; its content decides the format, not its suffix.
        key: take the mapping under this key, for example "model_ema" where the file holds both the trained weights
            and their average, or "model.state_dict_ema" where they lie deeper. Without it such a choice is logged as a
            warning.

    Raises:
        WeightsError: the path does not lead to a file of weights, the file is damaged, needs code to be read, or
            holds no tensors.
    """
    content, meta = read_content(path)
    return find_weights(content, key, str(path), meta)


def save_state_dict(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors to `path`, which afterwards holds either the complete new file or what it held before.

    The suffix names the format: ".safetensors", whose metadata is text alone, or ".pth", ".pt", ".bin" for `torch.save`
    of {"state_dict": ..., "meta": metadata}, which OpenMMLab and timm read. Tensors that share memory are written once
    each. Missing folders are made.

    Raises:
        InputError: unknown suffix, the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    if path.suffix not in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES):
        raise InputError(
            f"cannot tell the format of {path} from its suffix: end the name in {SAFETENSORS_SUFFIX} "
            f"or one of {', '.join(PICKLE_SUFFIXES)}"
        )
    if path.is_dir():
        raise InputError(f"{path} is a folder: give the name of a file in it")
    tensors = _without_shared_memory(state_dict)
    with whole_file(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # what the umask allows; safetensors' own files are private to the user
        _write(tensors, partial, metadata or {})
        partial.chmod(mode)
    return path


def _without_shared_memory(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors, seen = {}, set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage()
        # a view of a larger tensor would drag all of that into a pickle
        if memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(memory.data_ptr())
        tensors[name] = tensor
    return tensors


def _write(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        if path.suffix == SAFETENSORS_SUFFIX:
            texts = {name: text for name, text in metadata.items() if isinstance(text, str)}
            save_file(tensors, path, metadata=texts or None)
        else:
            torch.save({"meta": dict(metadata), "state_dict": tensors}, path)
    except (SafetensorError, RuntimeError) as error:  # so either reports what the system refuses
        raise OSError("writing stopped early") from error


def foreign_content(head: bytes) -> str | None:
    """Say what a file is, and what to do, if its first bytes show that it holds no weights; None if they may be."""
    if not head:
        return "is empty (zero bytes): copy or download it again"
    if head.startswith(GIT_LFS_HEADER):
        return (
            "is a git-lfs pointer, not the weights themselves: run `git lfs pull` in its repository, "
            "or download the file from the repository's web page"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "is a web page, not weights: the link led to a login, an error or a viewer; "
            "take the address of the file itself (on the Hugging Face Hub /resolve/, not /blob/)"
        )
    if head.startswith((b"\x1f\x8b", b"BZh", b"7z\xbc\xaf", b"\xfd7zXZ")) or head[257:262] == b"ustar":
        return "is a compressed archive: unpack it and pass the weights file inside"
    if not re.search(rb"[\x00-\x08\x0e-\x1f]", head):  # no control bytes: binary formats have them at the start
        start = " ".join(head.decode("utf-8", "ignore").split())[:40]
        return f"is text, not weights (it starts with {start!r}): pass the .safetensors or .pth file"
    return None


def _read_head(path: Path) -> bytes:
    if not path.exists():
        raise WeightsError(f"{path} does not exist: check the path, or pass a URL or a tag of published weights")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder: pass the weights file in it")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if reason := foreign_content(head):
        raise WeightsError(f"{path} {reason}")
    return head


def read_content(path: str | os.PathLike) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """All that a file of weights holds, and of that what is said about them; no code is needed to read it.

    Raises:
        WeightsError: as `read_weights`, except that tensors need not be there.
    """
    path = Path(path)
    head = _read_head(path)
    # the first 8 bytes of safetensors are the length of a JSON object that follows
    if head[8:9] == b"{" or (path.suffix == SAFETENSORS_SUFFIX and not head.startswith((b"PK", b"\x80"))):
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        _check_zip(path)
    elif not head.startswith(b"\x80"):
        raise WeightsError(f"{path} is neither safetensors nor a file of torch.save: pass a weights file")
    content = _load_pickle(path, mmap=head.startswith(b"PK"))
    if not isinstance(content, Mapping):
        return {}, {}
    meta = content.get("meta")
    return content, meta if isinstance(meta, Mapping) else {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _check_zip(path: Path) -> None:
    """`torch.save` writes a zip archive; its table of contents comes last, so a truncated file has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, "the end of the archive is missing") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program, not weights: in the project that made it, "
            "save the model's state_dict() with torch.save"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise WeightsError(f"{path} is a zip archive without weights of torch.save: unpack it and pass the file inside")


def _load_pickle(path: Path, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols; what cannot be read is an error all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if needed := _first_foreign_global(path):
            raise WeightsError(
                f"{path} needs the code of {needed!r} to be read, which is refused because a pickle can run any "
                "program: in the project that wrote it, save only the tensors, "
                "torch.save(model.state_dict(), 'weights.pth'), and pass that file"
            ) from error
        raise WeightsError(
            f"{path} is a pickle of a kind that cannot be read without running code: in the project that wrote it, "
            "save it again by torch.save(model.state_dict(), 'weights.pth') with its default protocol"
        ) from error
    except Exception as error:  # damaged bytes raise nearly any type, from UnicodeDecodeError to RuntimeError
        raise _damaged(path, re.split(r"\. |\n", str(error))[0].strip() or type(error).__name__) from error


def _first_foreign_global(path: Path) -> str | None:
    """The first class or function that a pickle names and that weights do not need."""
    names = [name for name in _globals(path) if not OF_TENSORS.fullmatch(name)]
    known = {name for names in _PLACEHOLDERS.values() for name in names}
    # one of those that are known is refused, too, where it is used for another end
    return next((name for name in names if name not in known), GETATTR if GETATTR in names else None)


def _globals(path: Path) -> list[str]:
    """The classes and functions that the pickles in a file name. Nothing is run: their opcodes are only listed."""
    names: list[str] = []
    with contextlib.ExitStack() as stack, contextlib.suppress(Exception):  # damaged: what was found until then counts
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        if zipfile.is_zipfile(file):
            archive = stack.enter_context(zipfile.ZipFile(file))
            file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith("/data.pkl"))))
        else:
            file.seek(0)
        for _ in range(LEGACY_PICKLES):
            pushed: list[Any] = []  # what each opcode puts on the stack, where it is a constant
            memo: list[Any] = []
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "STACK_GLOBAL"):
                    name = argument.replace(" ", ".") if argument else ".".join(map(str, pushed[-2:]))
                    names.append(name.replace("__builtin__.", "builtins."))  # the name of Python 2
                if opcode.name == "MEMOIZE":  # of protocol 4, as STACK_GLOBAL; older ones name globals in one opcode
                    memo.append(pushed[-1])
                elif isinstance(argument, int) and "BINGET" in opcode.name and memo:
                    pushed.append(memo[argument])
                else:
                    pushed.append(argument)
    return names


def find_weights(
    content: Mapping[str, Any],
    key: str | None = None,
    name: str = "the checkpoint",
    meta: Mapping[str, Any] = MappingProxyType({}),
) -> FoundWeights:
    """Choose among the sets of tensors in `content`: what `key` leads to, or by `WRAPPER_KEYS`, with a warning.

    Raises:
        InputError: `key` is no text.
        WeightsError: no tensors, or none where they were looked for; the message says where there are some.
    """
    if key is not None and (not isinstance(key, str) or not key):
        raise InputError(f"weights_key is {shown(key)}: give the key of a set of weights, such as 'state_dict_ema'")
    sets = dict(_tensor_sets(content))
    # The name of a parameter has a dot. Moments of an optimiser, the state of a random generator, a loss have none.
    sets = {path: tensors for path, tensors in sets.items() if any("." in name for name in tensors)} or sets
    ranks = {path: rank for path in sets if (rank := _rank(path, key or "")) is not None}
    if not ranks:
        raise WeightsError(name + _where_tensors_are(content, sets, key))
    taken = min(ranks, key=ranks.__getitem__)
    rivals = [path for path in (sets if key is None else ranks) if path != taken]
    if rivals and (key is None or key != taken):
        taken_from = repr(taken) if taken else "what lies at its top"
        logger.warning("%s: taken is %s; weights_key chooses %s instead", name, taken_from, _quoted(rivals))
    tensors = {at: tensor.detach() for at, tensor in sets[taken].items()}
    return FoundWeights(tensors, taken or None, tuple(path for path in sets if path not in (taken, "")), meta)


def _tensor_sets(content: object, path: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """All mappings of names to tensors in `content`, at any depth, by the keys that lead there."""
    if not isinstance(content, Mapping):
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    if tensors := {name: value for name, value in named.items() if isinstance(value, Tensor)}:
        yield path, tensors
    for name, value in named.items():
        yield from _tensor_sets(value, f"{path}.{name}" if path else name)


def _rank(path: str, start: str) -> list[int] | None:
    """The places in `WRAPPER_KEYS` of what follows `start` in `path`; None where that is anything else."""
    rest = path.removeprefix(start)
    if not path.startswith(start) or (start and rest and rest[0] != "."):
        return None
    keys = [key for key in rest.split(".") if key]
    return [WRAPPER_KEYS.index(key) for key in keys] if set(keys) <= set(WRAPPER_KEYS) else None


def _where_tensors_are(content: object, sets: Iterable[str], key: str | None) -> str:
    if sets:
        missed = "holds no tensors at its top level" if key is None else f"has no weights under {key!r}"
        return f" {missed}: choose weights_key= among {_quoted(path or None for path in sets)}"
    keys = f" (its keys are {_quoted(content)})" if isinstance(content, Mapping) and content else ""
    return f" holds no tensors{keys}: give a model's state_dict()"


def _quoted(names: Iterable[object]) -> str:
    return some([repr(name) for name in names], 8)


def _damaged(path: Path, reason: str) -> WeightsError:
    size = path.stat().st_size
    return WeightsError(f"{path} is truncated or damaged ({size} bytes; {reason}): copy or download it again")
