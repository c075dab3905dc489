"""What a run leaves behind: weights that carry their own description, and a state to go on from."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvt_backbones import InputError
from hvt_backbones.variants import find_variant
from hvt_backbones.weights.files import save_state_dict

from .config import Config

LAST_WEIGHTS = "model_last.safetensors"
BEST_WEIGHTS = "model_best.safetensors"
STATE = "checkpoint_last.pt"
LOG = "log.csv"
CONFIG = "config.yaml"
METRICS = "metrics.json"
CURVES = "curves.png"
RUN_FILES = (LAST_WEIGHTS, BEST_WEIGHTS, STATE, LOG, CONFIG, METRICS, CURVES)


def model_overrides(config: Config) -> dict[str, Any]:
    """The constructor arguments of the run's model: those of the recipe, and `in_chans` of its pictures."""
    channels = config.data.input_size[0]
    return config.model.overrides | ({} if channels == 3 else {"in_chans": channels})


def describe_model(config: Config, class_names: Sequence[str]) -> dict[str, str]:
    """The metadata from which `hvt predict` and `classification.validate` rebuild the model and its pictures."""
    data = config.data
    return {
        "hvt.model": find_variant(config.model.name)[0].name,
        "hvt.overrides": json.dumps(model_overrides(config)),
        "hvt.num_classes": str(len(class_names)),
        "hvt.class_names": json.dumps(list(class_names)),
        "hvt.input_size": json.dumps(list(data.input_size)),
        "hvt.mean": json.dumps(list(data.mean)),
        "hvt.std": json.dumps(list(data.std)),
        "hvt.interpolation": data.interpolation,
        "hvt.crop_pct": str(data.crop_pct),
    }


def save_weights(folder: Path, name: str, state_dict: Mapping[str, Tensor], description: Mapping[str, str]) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    save_state_dict(weights, folder / name, metadata=dict(description))


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Everything that a resumed run needs; only tensors and plain values, so that it loads without running code."""
    write_atomically(folder / STATE, lambda path: torch.save(dict(state), path))


def load_state(path: Path) -> dict[str, Any]:
    """
    Raises:
        InputError: not a state that `save_state` wrote.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zip and torch each have their own
        state = None
    if not isinstance(state, dict) or "description" not in state:
        raise InputError(f"output.resume: {path} is not a checkpoint of this trainer; give a {STATE}.")
    return state


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file that then replaces `path`: a reader sees the old or the new one, whole."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's own are for this user alone
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        reason = getattr(error, "strerror", None) or "no room, or the write was cut"
        raise InputError(
            f"output.dir: {path} was not written ({reason}); make room or give another --output-dir."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def held_run(folder: Path) -> list[str]:
    """The names of a run's files that `folder` already holds."""
    return [name for name in RUN_FILES if (folder / name).exists()]


def check_output(config: Config) -> None:
    """Refuse, without touching anything, a folder that is none or that holds another run.

    Raises:
        InputError: see above.
    """
    folder = Path(config.output.dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output.dir: {folder} is a file; give a folder with --output-dir.")
    if held_run(folder) and not (config.output.resume or config.output.overwrite):
        raise InputError(
            f"output.dir: {folder} already holds a run; continue it with --resume auto, replace it with --overwrite, "
            "or give another --output-dir."
        )


@contextlib.contextmanager
def output_folder(folder: Path) -> Any:
    """Make `folder`, sure that it can be written; if the body fails with nothing saved yet, it goes again.

    Raises:
        InputError: the folder cannot be made or written.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0")
    except OSError as error:
        _remove_empty(made)
        reason = f"cannot write to {folder} ({error.strerror})"
        raise InputError(f"output.dir: {reason}; give another --output-dir.") from None
    try:
        yield folder
    finally:
        _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
