"""Disks that are full and files that are damaged cost a run nothing that was saved."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from classification.checkpoint import files as checkpoint
from classification.checkpoint import manager
from classification.command_line import parse_command_line
from classification.reporting.log import EventWriter
from classification.trainer import Trainer

from .saved_runs import (
    RANDOM,
    WEIGHTS,
    Run,
    assert_nothing_else,
    assert_same,
    full_disk_for,
    learned,
    newest,
    settings_of,
)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("name", [checkpoint.STATE, "rank_00000.pt", checkpoint.MANIFEST])
def test_a_full_disk_leaves_the_checkpoint_before(
    name: str, quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick_run(*RANDOM)[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "whole")
    with monkeypatch.context() as patch:
        full_disk_for(name, patch, from_step=4)
        status, error = quick_run(*RANDOM)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: output.dir: the checkpoint of step 4 was not written to")
    assert "(No space left on device" in error or "no room" in error
    assert f"the last checkpoint is {newest(tmp_path / 'run')}. Make room" in error
    assert newest(tmp_path / "run").name == "step_00000003"
    assert checkpoint.damage(newest(tmp_path / "run")) is None
    assert_nothing_else(tmp_path / "run")
    assert quick_run(*RANDOM, "--resume", "auto")[0] == 0
    assert_same(learned(tmp_path / "whole"), learned(tmp_path / "run"))


def test_a_write_that_is_cut_short(quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = checkpoint.seal_checkpoint

    def first_only(staging: Path, folder: Path, step: int, **settings: bool) -> None:
        seal(staging, folder, step, **settings)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "seal_checkpoint", first_only)
            status, error = quick_run(*RANDOM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (status, error.count("\n")) == (2, 1)
    assert "the checkpoint of step 3 was not written" in error
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000002"]
    assert_nothing_else(tmp_path / "run")
    assert quick_run(*RANDOM, "--resume", "auto")[0] == 0


@pytest.mark.parametrize("part", ["weights", "table"])
def test_a_full_disk_after_the_checkpoint(
    part: str, quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if part == "weights":
            patch.setattr("hvt_backbones.weights.files._write", full)
        else:
            patch.setattr("csv.DictWriter.writeheader", full)
        status, error = quick_run(*RANDOM)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert newest(tmp_path / "run").name == "step_00000003"
    assert_nothing_else(tmp_path / "run")
    assert quick_run(*RANDOM, "--resume", "auto")[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "mended")
    assert quick_run(*RANDOM)[0] == 0
    assert_same(learned(tmp_path / "run"), learned(tmp_path / "mended"))


def damage_truncated(path: Path) -> str:
    contents = (path / checkpoint.STATE).read_bytes()
    (path / checkpoint.STATE).write_bytes(contents[: len(contents) // 2])
    return f"state.pt has {len(contents) // 2} bytes instead of {len(contents)}"


def damage_flipped(path: Path) -> str:
    contents = bytearray((path / checkpoint.STATE).read_bytes())
    contents[len(contents) // 2] ^= 1
    (path / checkpoint.STATE).write_bytes(contents)
    return "state.pt does not match its SHA-256"


def damage_rank_missing(path: Path) -> str:
    (path / "rank_00000.pt").unlink()
    return "rank_00000.pt is missing"


def damage_manifest_missing(path: Path) -> str:
    (path / checkpoint.MANIFEST).unlink()
    return "manifest.json is missing"


def damage_manifest_garbled(path: Path) -> str:
    (path / checkpoint.MANIFEST).write_bytes(random.Random(0).randbytes(300))
    return "manifest.json cannot be read"


def damage_manifest_empty(path: Path) -> str:
    (path / checkpoint.MANIFEST).write_text('{"files": {}}')
    return "manifest.json does not name state.pt"


DAMAGES = {key.removeprefix("damage_"): value for key, value in list(globals().items()) if key.startswith("damage_")}


@pytest.fixture
def finished(quick_run: Run, tmp_path: Path) -> Path:
    """A finished run, without the weights of its last epoch, so that who resumes it has to write them."""
    assert quick_run(*RANDOM)[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for path in [tmp_path / "run" / name for name in WEIGHTS]:
        with safe_open(path, "pt") as file:
            last = file.metadata()["hvt.epoch"] == "2"
        if last:  # the best may be those of the first
            path.unlink()
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_left_out(
    damage: Callable[[Path], str],
    finished: Path,
    quick_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reason = damage(newest(finished))
    warnings = []
    choose = manager.newest_sound
    monkeypatch.setattr(manager, "newest_sound", lambda folder, warn: choose(folder, warnings.append))
    assert quick_run(*RANDOM, "--resume", "auto") == (0, "")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{finished / 'checkpoints' / 'step_00000006'} is damaged ({reason}")
    assert_same(learned(tmp_path / "whole"), learned(finished))
    assert checkpoint.damage(newest(finished)) is None
    assert_nothing_else(finished)


def test_the_warning_is_seen(finished: Path, capsys: pytest.CaptureFixture) -> None:
    damage_truncated(newest(finished))
    capsys.readouterr()
    assert manager.choose_checkpoint(finished, "auto") == checkpoint.step_folder(finished, 4)
    assert capsys.readouterr().out.startswith(f"warning: {finished / 'checkpoints' / 'step_00000006'} is damaged")


def test_only_damaged_checkpoints_are_one_line(finished: Path, quick_run: Run) -> None:
    for path in checkpoint.list_checkpoints(finished):
        damage_truncated(path)
    status, error = quick_run(*RANDOM, "--resume", "auto")
    assert (status, error.count("\n")) == (2, 1)
    assert f"all checkpoints in {finished / 'checkpoints'} are damaged; --overwrite starts anew" in error


def test_a_damaged_newest_one_does_not_push_out_the_sound_ones(finished: Path) -> None:
    damage_truncated(newest(finished))
    sound = checkpoint.step_folder(finished, 3)
    shutil.rmtree(checkpoint.step_folder(finished, 4))
    keep = (*RANDOM, "--output.keep_last", "1", "--output.keep_best", "0")
    config = parse_command_line([*settings_of(finished), *keep, "--resume", str(sound)])
    trainer = Trainer(config)
    trainer.progress.step = 4
    trainer.saver.save()
    assert [path.name for path in checkpoint.list_checkpoints(finished)] == ["step_00000004"]
    assert checkpoint.damage(newest(finished)) is None


def test_events_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Full:
        def add_scalar(self, *args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events = EventWriter(tmp_path, wanted=True, step=0)
    events._wanted, events._writer = True, Full()
    events.add(1, loss=1.0)
    events.add(2, loss=1.0)
    events.close()
    assert capsys.readouterr().out.count("warning: no more TensorBoard events in") == 1
