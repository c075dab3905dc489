"""Weight files on the disk: read without running code, written whole or not at all.

Only tensors, and the text that describes them, are taken from a file.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..atomic import whole_file
from ..errors import InputError, WeightsError
from .pickles import check_zip, damaged, load_pickle
from .report import shown, some

# Keys under which training code stores the mapping of tensors, the first found wins; tensors beside them come before
# all. The trained weights come before their moving average, so that a checkpoint that holds both is read the same way
# as one that holds only the first.
WRAPPER_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema", "module")

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")

GIT_LFS_HEADER = b"version https://git-lfs.github.com/spec/"
HEAD_BYTES = 1024
logger = logging.getLogger(__name__)


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
        check_zip(path)
    elif not head.startswith(b"\x80"):
        raise WeightsError(f"{path} is neither safetensors nor a file of torch.save: pass a weights file")
    content = load_pickle(path, mmap=head.startswith(b"PK"))
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
        raise damaged(path, str(error)) from error


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
