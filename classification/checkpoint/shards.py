"""The part of a checkpoint that each process writes and reads itself, by `torch.distributed.checkpoint`.

Tensors alone lie there: that package unpickles everything else with whatever code it names.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hvt_backbones import InputError

SHARDS = "shards"
# what the list of tensors, a pickle, is made of, beside torch's dtypes
METADATA, FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
NAMES = {
    (METADATA, "Metadata"), (METADATA, "MetadataIndex"), (METADATA, "StorageMeta"), (METADATA, "TensorProperties"),
    (METADATA, "TensorStorageMetadata"), (METADATA, "ChunkStorageMetadata"), (METADATA, "_MEM_FORMAT_ENCODING"),
    (FILES, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}  # fmt: skip


def write_shards(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write this process's part of nested tensors; a collective call.

    Raises:
        OSError: any process could not write its part.
    """
    try:
        dcp.save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


def read_shards(folder: Path, into: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that `into` has, in their places, for those of its entries that were written; a collective call.

    Raises:
        InputError: they do not fit, or the list of tensors names code.
    """
    reader = _Reader(folder)
    held = reader.read_metadata().state_dict_metadata
    wanted = {name: part for name, part in into.items() if any(key.startswith(f"{name}.") for key in held)}
    try:
        dcp.load(wanted, storage_reader=reader)
    except CheckpointException as error:
        raise InputError(f"{folder}: {_reason(error)}") from None
    return wanted


def read_whole(folder: Path) -> dict[str, Tensor]:
    """The weights that are evaluated, all of them in this process: the average where there is one.

    Raises:
        InputError: the list of tensors names code.
    """
    reader = _Reader(folder)
    held = {
        key: kind for key, kind in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }  # fmt: skip
    part = "ema." if any(key.startswith("ema.") for key in held) else "model."
    tensors = {
        key: torch.empty(kind.size, dtype=kind.properties.dtype) for key, kind in held.items() if key.startswith(part)
    }
    dcp.load(tensors, storage_reader=reader)
    return {key.removeprefix(part): tensor for key, tensor in tensors.items()}


def _reason(error: CheckpointException) -> str:
    found = next(iter(error.failures.values()))[0]
    return " ".join(str(found).split())


class _Reader(dcp.FileSystemReader):
    """Reads the list of tensors without running code that it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                return _Unpickler(file).load()
            except pickle.UnpicklingError as error:
                raise InputError(f"{file.name}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in NAMES and not is_dtype:
            raise pickle.UnpicklingError(f"the list of tensors names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)
