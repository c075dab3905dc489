"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hvt_backbones import InputError
from hvt_backbones.model_file import entry

from .files import CHECKPOINTS, MANIFEST, damage, held_run, list_checkpoints, newest_sound

# Settings that may differ when a run goes on: they change where and how it runs, not what it computes.
FREE_SETTINGS = (
    "output.", "data.dir", "data.workers", "data.on_error", "data.max_errors", "train.device", "train.threads",
    "train.benchmark_steps", "parallel.timeout",
)  # fmt: skip

NAMES = {"global_batch": "global batch", "pictures": "training pictures"}


def choose_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that `output.resume` means for a run in `folder`; None where "auto" finds nothing to go on from.

    Raises:
        InputError: no such checkpoint, or a damaged one with none before it.
    """

    def warn(message: str) -> None:
        print(f"warning: {message}", flush=True)

    if resume == "auto":
        found = newest_sound(folder, warn)
        held = held_run(folder)
        if found is None and held:
            raise InputError(f"output.resume: {folder} holds {held[0]} but no checkpoint; --overwrite starts anew.")
        return found
    path = Path(resume)
    if not path.is_dir():
        raise InputError(f"output.resume: {path} does not exist; give a checkpoint or run folder, or auto.")
    if folder.resolve() not in (path.resolve(), path.resolve().parent.parent) and held_run(folder):
        raise InputError(
            f"output.dir: {folder} already holds another run than {path}; continue it with --resume auto, or give "
            "another --output-dir."
        )
    if list_checkpoints(path):
        return newest_sound(path, warn)
    if not (path / MANIFEST).is_file():
        raise InputError(
            f"output.resume: {path} is not a checkpoint of this trainer; give a folder {CHECKPOINTS}/step_*."
        )
    if reason := damage(path):
        raise InputError(f"output.resume: {path} is damaged ({reason}); give another checkpoint.")
    return path


def check_same_run(
    state: Mapping[str, Any],
    description: Mapping[str, str],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    allowed: bool,
    global_batch: int,
    pictures: int,
) -> list[str]:
    """The settings that differ from those of a checkpoint's `state`, which are to be `allowed`.

    Raises:
        InputError: it is of another model or other classes, or settings differ and that is not allowed.
    """
    for name in ("model", "overrides", "class_names"):
        there, here = entry(state["description"], name), entry(description, name)
        if there != here:
            raise InputError(f"output.resume: the checkpoint is of another model: {name} {there} there, {here} here.")
    differences = changed_settings(state["config"], settings)
    for name, now in {"global_batch": global_batch, "pictures": pictures}.items():
        if state[name] != now:
            differences.append(f"{NAMES[name]} {state[name]} there, {now} here")
    if differences and not allowed:
        raise InputError(
            f"output.resume: settings differ from the checkpoint's: {'; '.join(differences)}. Give them as they were, "
            "or --allow-changes to go on with these."
        )
    return differences


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`optimizer.lr 0.001 there, 0.002 here`, for each setting that matters and differs."""
    keys = {
        f"{section}.{name}": (section, name) for part in (before, now) for section in part for name in part[section]
    }
    absent = "absent"
    return [
        f"{key} {old} there, {new} here"
        for key, (section, name) in keys.items()
        if not key.startswith(FREE_SETTINGS)
        and (old := before.get(section, {}).get(name, absent)) != (new := now.get(section, {}).get(name, absent))
    ]


@cache  # asked once: files may change while the run goes on
def revision() -> str | None:
    """The commit of this checkout, with a `+` where files have changed since; None outside of one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
