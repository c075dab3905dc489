"""What a run leaves behind: weights that carry their own description, and checkpoints to go on from.

A checkpoint is a folder `checkpoints/step_00001234`: `state.pt` (all that the processes share), `rank_00000.pt` and so
on (the random generators of each), and `manifest.json` with the size and SHA-256 of every file. It is written beside
its place and renamed into it, so it is there whole or not at all; what was damaged afterwards does not match its
manifest.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from hvt_backbones import InputError
from hvt_backbones.atomic import leftovers
from hvt_backbones.weights.download import sha256_of

from ..config import OutputConfig
from ..progress import score

LAST_WEIGHTS = "model_last.safetensors"
BEST_WEIGHTS = "model_best.safetensors"
CHECKPOINTS = "checkpoints"
STATE = "state.pt"
MANIFEST = "manifest.json"
LOCK = ".lock"
BAD_BATCH = "bad_batch.txt"
LOG = "log.csv"
CONFIG = "config.yaml"
METRICS = "metrics.json"
CURVES = "curves.png"
REPORT = "report.html"
TENSORBOARD = "tensorboard"
RECONSTRUCTIONS = "reconstructions"
RUN_FILES = (LAST_WEIGHTS, BEST_WEIGHTS, CHECKPOINTS, LOG, CONFIG, METRICS, CURVES, REPORT)


def run_folder(output: OutputConfig) -> Path:
    assert output.dir is not None  # the command line has named it after the recipe
    return Path(output.dir)


def step_folder(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, damaged ones included."""
    found = [path for path in (folder / CHECKPOINTS).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def staging_folder(folder: Path, step: int) -> Path:
    """Where the files of a checkpoint are written; the same for every process."""
    return folder / CHECKPOINTS / f".step_{step:08d}"


def seal_checkpoint(staging: Path, folder: Path, step: int, *, replace_run: bool = False) -> None:
    """Write the manifest of the complete `staging` folder and put it in its place.

    Later checkpoints, of a try that was given up or damaged since, go: they are not what comes after this one.

    Args:
        replace_run: so do all that `folder` holds, which are another run's.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    entries = {
        path.relative_to(staging).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in files
    }
    (staging / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=1) + "\n")
    for path in (*files, staging / MANIFEST, staging):
        _flush(path)
    place = step_folder(folder, step)
    others = [path for path in list_checkpoints(folder) if replace_run or step_of(path) >= step]
    aside = [path.rename(path.with_name(f".old_{path.name}")) for path in others]
    staging.rename(place)
    _flush(place.parent)
    for path in aside:
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until the disk holds it: a rename must not get there before the contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file of its manifest is there, with its size and SHA-256."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        if STATE not in manifest["files"]:
            return f"{MANIFEST} does not name {STATE}"
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} does not match its SHA-256"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def newest_sound(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run that is not damaged, with a warning for each that is; None if there is none.

    Raises:
        InputError: there are checkpoints, all of them damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        if (reason := damage(path)) is None:
            return path
        warn(f"{path} is damaged ({reason}) and is left out; the one before it is used")
    if checkpoints:
        raise InputError(
            f"output.resume: all checkpoints in {folder / CHECKPOINTS} are damaged; --overwrite starts anew."
        )
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state.pt` of a checkpoint folder, on the CPU.

    Raises:
        InputError: not a checkpoint of this trainer.
    """
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except Exception:  # pickle, zip and torch each have their own
        state = None
    if not isinstance(state, dict) or "description" not in state:
        raise InputError(
            f"output.resume: {checkpoint} is not a checkpoint of this trainer; give a folder {CHECKPOINTS}/step_*."
        )
    return state


def prune(folder: Path, history: Sequence[Mapping[str, Any]], *, keep_last: int, keep_best: int) -> None:
    """Remove all checkpoints but the newest, and those at the end of the best epochs."""
    checkpoints = list_checkpoints(folder)
    best = sorted(history, key=score, reverse=True)[:keep_best]
    kept = {path.name for path in checkpoints[-keep_last:]} | {step_folder(folder, row["step"]).name for row in best}
    for path in checkpoints:
        if path.name not in kept:
            # renamed first: a removal that is cut short must not leave what looks like a damaged checkpoint
            shutil.rmtree(path.rename(path.with_name(f".old_{path.name}")), ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was still writing."""
    for path in (folder / CHECKPOINTS).glob(".*step_*"):
        shutil.rmtree(path, ignore_errors=True)
    written = [path for name in (*RUN_FILES, BAD_BATCH) for path in leftovers(folder / name)]
    written += (folder / RECONSTRUCTIONS).glob(".*.partial.png")
    for path in (*written, *folder.glob(".tmp??????")):  # the last are what safetensors writes to
        path.unlink(missing_ok=True)


def held_run(folder: Path) -> list[str]:
    """The names of a run's files that `folder` already holds."""
    # a run that was killed before its first checkpoint has left that folder alone, and nothing in it
    return [
        name for name in RUN_FILES if (list_checkpoints(folder) if name == CHECKPOINTS else (folder / name).exists())
    ]


def check_output(output: OutputConfig, *, benchmark: bool) -> None:
    """Refuse, without touching anything, a folder that is none or that holds another run.

    Raises:
        InputError: see above.
    """
    folder = run_folder(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output.dir: {folder} is a file; give a folder with --output-dir.")
    if held_run(folder) and not (benchmark or output.resume or output.overwrite):
        raise InputError(
            f"output.dir: {folder} already holds a run; continue it with --resume auto, replace it with --overwrite, "
            "or give another --output-dir."
        )


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Make `folder`, sure that it can be written, for this process alone; if nothing gets saved in it, it goes again.

    Raises:
        InputError: the folder cannot be made or written, or another process is training into it.
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
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(
            f"output.dir: another process is training into {folder} now; wait for it, or give another --output-dir."
        ) from None
    try:
        yield folder
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        _remove_empty([folder / CHECKPOINTS, *made])


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
