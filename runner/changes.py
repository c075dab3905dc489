"""What a resumed run would do otherwise than its checkpoint's: told, refused, or made to hold."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from hvt_backbones.errors import InputError

# what a training computes; the rest of a configuration tells of it, or tests
SECTIONS = ("model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg", "auto_scale_lr",
            "custom_hooks", "randomness", "find_unused_parameters", "sync_bn")  # fmt: skip
# and where, how fast, and from what it started
FREE = ("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "data_root", "with_cp", "max_logits",
        "pretrained", "init_cfg", "val_interval", "val_begin", "dynamic_intervals", "meta_keys")  # fmt: skip
LENGTH = ("max_epochs", "max_iters")
ABSENT = "absent"
SHOWN = 80  # characters of a value


def check_changes(cfg: Config, path: str, *, allowed: bool) -> bool:
    """Compare a configuration with the one that a checkpoint was made with.

    A longer or shorter run is none of the differences, as long as each schedule says its own end.

    Returns:
        Whether they differ in what matters.

    Raises:
        InputError: they do, and that is not `allowed`; the message lists how.
    """
    before = read_settings(path)
    if before is None:
        print(f"{path} does not tell its settings: they were not compared with those of now")
        return False
    now = _plain(cfg.to_dict())
    backbones = [settings.get("model", {}).get("backbone") or {} for settings in (before, now)]
    if backbones[0].get("type") != backbones[1].get("type"):  # `HVTResumeHook` sees whether they are the same model
        for settings in (before, now):
            settings["model"].pop("backbone", None)
    old, new = (dict(_flat(_relevant(settings))) for settings in (before, now))
    differences = [
        f"{key} {_shown(old.get(key, ABSENT))} there, {_shown(new.get(key, ABSENT))} here"
        for key in {**old, **new}
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]
    if differences and not allowed:
        raise InputError(
            f"--resume: settings differ from those of {path}: {'; '.join(differences)}. Give them as they were, or "
            "--allow-changes to go on with these"
        )
    for difference in differences:
        print(f"changed: {difference}")
    return bool(differences)


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The configuration in a checkpoint that was checked, read as data: it is Python, of which nothing is run.

    None where there is none, or where it is more than data.
    """
    from mmengine.runner.checkpoint import get_torch_safe_globals

    try:
        with torch.serialization.safe_globals(get_torch_safe_globals()):
            meta = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["meta"]
        tree = ast.parse(meta["cfg"])
        return {node.targets[0].id: _literal(node.value) for node in tree.body if isinstance(node, ast.Assign)}
    except Exception:  # a file of another kind, or older than mmap: the reader of the run says what is wrong with it
        return None


def _literal(node: ast.expr) -> Any:
    """`ast.literal_eval` with `dict(key=value)`, as MMEngine writes configurations."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    return ast.literal_eval(node)


def _plain(value: Any) -> Any:
    """As it comes back from the text: tuples are lists, which no part of the frameworks tells apart here."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: settings[key] for key in SECTIONS if settings.get(key) is not None}
    schedules = chosen.get("param_scheduler", [])
    schedules = [schedules] if isinstance(schedules, Mapping) else schedules
    if all("end" in schedule for schedule in schedules):
        length = LENGTH
        chosen["train_cfg"] = {key: value for key, value in chosen.get("train_cfg", {}).items() if key not in length}
    return chosen


def _flat(value: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """`model.backbone.depths.0`: 2, ..., without what is free."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or (not value and above):
        yield above, value
        return
    if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
        yield above, value  # a list of numbers is one value
        return
    for key, item in items:
        if key not in FREE:
            yield from _flat(item, f"{above}.{key}" if above else str(key))


def _shown(value: Any) -> str:
    text = str(value) or "nothing"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def resume_changed(runner: Runner, resume: Any) -> None:
    """Resume by `resume`, which leaves the schedules as they were built, and go on by the settings of now.

    The optimiser keeps its moments; rates, decays and schedules are the configuration's, brought to where the run is.
    """
    options = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"}
        for group in runner.optim_wrapper.param_groups
    ]
    resume()
    for group, option in zip(runner.optim_wrapper.param_groups, options, strict=True):
        group.update(option)
    schedulers = runner.param_schedulers or []
    steps, epochs = runner.iter, runner.epoch
    per_epoch = -(-steps // epochs) if epochs else 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `scheduler.step")  # there were such steps before
        for step in range(1, steps + 1):
            for scheduler in schedulers:
                if not scheduler.by_epoch or (per_epoch and step % per_epoch == 0 and step // per_epoch <= epochs):
                    scheduler.step()
