"""Nothing lost: runs that are killed, told to stop, fed with nonsense or out of disk, and what they leave."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from classification import checkpoint, parallel, resume
from classification.command_line import parse_command_line
from classification.log import EventWriter
from classification.pictures import Pictures
from classification.stop import StopRequest
from classification.trainer import Trainer

from .conftest import QUICK

Run = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = (checkpoint.LAST_WEIGHTS, checkpoint.BEST_WEIGHTS)
# a third of a second each on `small_data`: 3 steps per epoch, everything random on
RANDOM = (
    "--model.overrides.drop_path_rate", "0.3", "--train.ema_decay", "0.9", "--augmentation.mixup", "0.8",
    "--output.save_steps", "2", "--output.keep_last", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, of different brightness: 24 training and 12 held-out pictures."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for level, name in enumerate("abc"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 150, (36, 40, 3)) + 40 * level
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return root


def forked_runs(scenario: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("forked_runs.py")), scenario, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def newest(folder: Path) -> Path:
    return checkpoint.list_checkpoints(folder)[-1]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested values of a checkpoint, tensors bit by bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)), where
    else:
        assert ours == theirs, where


def learned(folder: Path) -> dict[str, Any]:
    """All that a run has computed: not its clock, nor where it lies."""
    last = newest(folder)
    state = checkpoint.load_state(last)
    for row in state["history"]:
        for name in ("ms_per_step", "images_per_second", "peak_memory_gib", "val_seconds", "seconds"):
            del row[name]
    del state["progress"]["seconds"], state["config"]["output"], state["config"]["data"]["workers"]
    del state["revision"]  # a commit may be made between two runs
    result = {"state": state}
    result |= {path.name: torch.load(path, weights_only=True) for path in sorted(last.glob("rank_*.pt"))}
    for name in WEIGHTS:
        with safe_open(folder / name, "pt") as file:
            result[name] = (load_file(folder / name), file.metadata())
    rows = (folder / checkpoint.LOG).read_text().splitlines()
    return result | {"rows": len(rows)}


def assert_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} <= {*checkpoint.RUN_FILES, checkpoint.TENSORBOARD}
    assert all(re.fullmatch(r"step_\d{8}", path.name) for path in (folder / checkpoint.CHECKPOINTS).iterdir())


# ---- kill -9


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers", "kills"), [(1, 0, 20), (2, 0, 20), (1, 1, 6)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    world: int, workers: int, kills: int, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    result = forked_runs("relay", pictures, folder, world, workers, kills)
    assert result["whole"] == result["end"] == [0] * world
    happened = result["kills"]
    assert [kill["status"] for kill in happened] == [-signal.SIGKILL] * kills
    # a rank that was left alone ended by itself, with its line
    assert {status for kill in happened for status in kill["others"]} <= {-signal.SIGKILL, 1}
    within = Counter(kill["phase"] for kill in happened)
    if kills == 20:
        least = {"step": 5, "save": 1, "seal": 3, "weights": 2, "validation": 3}
        assert all(within[phase] >= count for phase, count in least.items()), within
        assert world == 1 or [1] in [kill["others"] for kill in happened]
    assert_same(learned(folder / "whole"), learned(folder / "killed"))
    assert_nothing_else(folder / "killed")
    assert "Traceback" not in (folder / "killed.txt").read_text()


def test_a_run_killed_before_its_first_checkpoint_begins_again(quick_run: Run, tmp_path: Path) -> None:
    staging = checkpoint.staging_folder(tmp_path / "run", 3)
    staging.mkdir(parents=True)
    (staging / checkpoint.STATE).write_bytes(b"half of it")
    (tmp_path / "run" / f".{checkpoint.LAST_WEIGHTS}.0123abcd.partial").write_bytes(b"half of it")
    (tmp_path / "run" / ".tmpGVeNg8").write_bytes(b"half of it")
    assert quick_run("--resume", "auto", "--epochs", "1")[0] == 0
    assert_nothing_else(tmp_path / "run")
    assert checkpoint.LAST_WEIGHTS in {path.name for path in (tmp_path / "run").iterdir()}


def test_resuming_at_step_100000_replays_nothing(quick: tuple[str, ...], tmp_path: Path) -> None:
    """A million pictures; five steps' worth of checkpoint, moved far into the run."""
    options = (
        "digits", *quick, "--data.kind", "synthetic", "--data.synthetic_images", "1281167", "--epochs", "300",
        "--batch-size", "128", "--data.input_size", "[3, 8, 8]", "--output-dir", str(tmp_path / "run"),
    )  # fmt: skip
    Trainer(parse_command_line(options)).save()
    state = checkpoint.load_state(newest(tmp_path / "run"))
    epochs, step = divmod(100_000, state["steps_per_epoch"])
    row = {"epoch": 1, "step": 1, "top1": 0.0, "val_seconds": 1.0}
    state |= {"step": 100_000, "history": [row] * epochs}
    staging = checkpoint.staging_folder(tmp_path / "run", 100_000)
    shutil.copytree(newest(tmp_path / "run"), staging)
    (staging / checkpoint.MANIFEST).unlink()
    torch.save(state, staging / checkpoint.STATE)
    checkpoint.seal_checkpoint(staging, tmp_path / "run", 100_000)
    AcceleratorState._reset_state(reset_partial_state=True)

    class Reached(Exception):
        pass

    seen = []

    def first_step(group: list, stop: StopRequest) -> None:
        seen.extend(group)
        raise Reached

    begin = time.monotonic()
    trainer = Trainer(parse_command_line([*options, "--resume", "auto"]))
    trainer.train_step = first_step
    with pytest.raises(Reached):
        trainer.run()
    assert time.monotonic() - begin < 5
    assert trainer.step == 100_000
    order = np.random.default_rng([0, epochs]).permutation(1_281_167)
    assert seen[0].indices.tolist() == order[step * 128 : (step + 1) * 128].tolist()


# ---- signals


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_and_goes_on_from_there(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("signals", pictures, tmp_path)
    assert (result["whole"], result["whole of two"]) == ([0], [0, 0])
    wholes = {1: learned(tmp_path / "whole"), 2: learned(tmp_path / "whole of two")}
    steps = {"in a step": 3, "while loading": 2, "while saving": 3, "in validation": 6, "while writing weights": 7}
    for stopped in result["stopped"]:
        name, world = stopped["name"], len(stopped["statuses"])
        keyboard = name.endswith("keyboard") or name.startswith(
            ("while loading", "while seal", "while writing", "both")
        )
        assert stopped["statuses"] == [130 if keyboard else 143] * world, stopped
        assert stopped["seconds"] < 10, stopped
        said = stopped["said"]
        assert "Traceback" not in said, said
        assert "Warning" not in said, said
        line = f"stopped by {'SIGINT' if keyboard else 'SIGTERM'}; --resume auto goes on"
        assert [end for end in said.splitlines() if end.endswith(line)] == said.splitlines()[-world:], said
        assert stopped["step"] == steps.get(name, stopped["step"]) > 0, stopped
        assert stopped["end"] == [0] * world
        assert_same(wholes[world], learned(tmp_path / name), name)
        assert_nothing_else(tmp_path / name)
    early = result["interrupted at the start"]
    assert (early["statuses"], early["said"], early["end"]) == ([130], "interrupted\n", [0])


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0, 3.0])
def test_an_interrupt_while_the_imports_run_is_one_line(seconds: float, pictures: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "classification.train", "digits", "--epochs", "1000", "--data-dir", str(pictures),
               "--data.kind", "imagefolder", "--batch-size", "4", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert re.fullmatch(r"interrupted\n|stopped by SIGINT; --resume auto goes on\n", error)


@pytest.mark.slow
def test_the_command_stops_with_its_workers(pictures: Path, tmp_path: Path) -> None:
    """The whole of it, from a shell: a signal to the process group, while two workers decode."""
    # PyTorch warns of more workers than cores
    command = [
        sys.executable, "-W", "ignore::UserWarning", "-m", "classification.train", "digits", "--epochs", "1000",
        "--data-dir", str(pictures), "--data.kind", "imagefolder", "--batch-size", "4", "--data.workers", "2",
        "--schedule.warmup_epochs", "0", "--model.overrides.embed_dim", "24", "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not checkpoint.list_checkpoints(tmp_path / "run"):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (143, "stopped by SIGTERM; --resume auto goes on\n"), output
    assert checkpoint.damage(newest(tmp_path / "run")) is None


def test_a_second_interrupt_ends_at_once_but_a_doubled_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        stop._since -= 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- no numbers


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let training pictures come out as `value`, from the `first` that is asked for to the `last`."""

    def spoil(value: float, *, first: int = 1, last: int = 10**6) -> None:
        load, count = Pictures.load, 0

        def spoiled(pictures: Pictures, index: int) -> tuple[torch.Tensor, int]:
            nonlocal count
            image, target = load(pictures, index)
            if "train" in pictures.filename(index):
                count += 1
                image = torch.full_like(image, value) if first <= count <= last else image
            return image, target

        monkeypatch.setattr(Pictures, "load", spoiled)

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_of_bad_steps_ends_it_and_names_the_pictures(
    value: float, spoil: Callable, quick_run: Run, tmp_path: Path
) -> None:
    spoil(value, first=13)  # the second epoch
    status, error = quick_run("--train.max_bad_steps", "2")
    assert (status, error.count("\n")) == (1, 1)
    assert error.startswith("error: training diverged at step 5 (epoch 2): loss nan, gradient norm ")
    assert "2 bad steps in a row" in error
    assert f"The last good checkpoint is {newest(tmp_path / 'run')};" in error
    names = (tmp_path / "run" / checkpoint.BAD_BATCH).read_text().splitlines()
    order = np.random.default_rng([0, 1]).permutation(12)[4:8]
    listing = sorted((tmp_path / "small data" / "train").rglob("*.png"))
    assert names == [str(listing[index]) for index in order]
    assert all(name in error for name in names)
    assert newest(tmp_path / "run").name == "step_00000003"


def test_a_bad_step_is_left_out_and_counted(
    spoil: Callable, quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--train.ema_decay", "0.9", "--output.save_steps", "1", "--output.keep_last", "9", "--epochs", "2")
    spoil(float("nan"), first=6, last=6)  # in the second step
    assert quick_run(*options)[0] == 0
    one, two, three = (checkpoint.load_state(checkpoint.step_folder(tmp_path / "run", step)) for step in (1, 2, 3))
    for part in ("model", "ema", "optimizer"):
        before, after = one[part], two[part]
        if part == "optimizer":  # its rate goes on with the schedule
            before, after = before["state"], after["state"]
        assert_same(before, after, part)
    assert not torch.equal(two["model"]["head.weight"], three["model"]["head.weight"])
    assert [(state["bad_steps"], state["skipped_steps"]) for state in (one, two, three)] == [(0, 0), (1, 1), (0, 1)]
    assert json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["skipped_steps"] == 1
    assert newest(tmp_path / "run").name == "step_00000006"


@pytest.mark.slow
def test_the_rank_with_the_bad_picture_names_it(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("bad_picture", pictures, tmp_path)
    assert result["statuses"] == [1, 1]
    # a batch of two pictures on each rank: those of the other one are not suspected
    names = (tmp_path / "run" / checkpoint.BAD_BATCH).read_text().splitlines()
    assert len(names) == 2
    assert str(pictures / "train" / "b" / "3.png") in names
    assert "Traceback" not in result["said"]


# ---- disks


def full_disk_for(name: str, monkeypatch: pytest.MonkeyPatch, *, from_step: int) -> None:
    """Let the file `name` of later checkpoints lie on the device that is always full."""
    staging_folder = checkpoint.staging_folder

    class Staging(type(Path())):
        def mkdir(self, *args, **settings) -> None:
            super().mkdir(*args, **settings)
            os.symlink("/dev/full", self / name)

    def full(folder: Path, step: int) -> Path:
        place = staging_folder(folder, step)
        return Staging(place) if step >= from_step else place

    monkeypatch.setattr(checkpoint, "staging_folder", full)


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
            patch.setattr("hvt_backbones.weights.files._write_safetensors", full)
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
    """A finished run, without the weights, so that who resumes it has to write them."""
    assert quick_run(*RANDOM)[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for name in WEIGHTS:
        (tmp_path / "run" / name).unlink()
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
    choose = resume.newest_sound
    monkeypatch.setattr(resume, "newest_sound", lambda folder, warn: choose(folder, warnings.append))
    assert quick_run(*RANDOM, "--resume", "auto") == (0, "")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{finished / 'checkpoints' / 'step_00000006'} is damaged ({reason}")
    assert_same(learned(tmp_path / "whole"), learned(finished))
    assert checkpoint.damage(newest(finished)) is None
    assert_nothing_else(finished)


def test_the_warning_is_seen(finished: Path, capsys: pytest.CaptureFixture) -> None:
    damage_truncated(newest(finished))
    capsys.readouterr()
    assert resume.choose_checkpoint(finished, "auto") == checkpoint.step_folder(finished, 4)
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
    trainer.step = 4
    trainer.save()
    assert [path.name for path in checkpoint.list_checkpoints(finished)] == ["step_00000004"]
    assert checkpoint.damage(newest(finished)) is None


def settings_of(folder: Path) -> tuple[str, ...]:
    """Those of `quick_run` in `folder`."""
    return ("digits", *QUICK, "--data-dir", str(folder.parent / "small data"), "--output-dir", str(folder))


# ---- which checkpoints are kept, and whose they are


def test_what_a_checkpoint_holds(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run(*RANDOM, "--train.accumulation", "2", "--train.amp", "bf16")[0] == 0
    folder = newest(tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {checkpoint.STATE, "rank_00000.pt", checkpoint.MANIFEST}
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    config = parse_command_line(
        [*settings_of(tmp_path / "run"), *RANDOM, "--train.accumulation", "2", "--train.amp", "bf16"]
    )
    trainer = Trainer(replace(config, output=replace(config.output, resume="auto")))
    assert_same(state["model"], dict(trainer.model.state_dict()))
    assert_same(state["ema"], dict(trainer.ema.module.state_dict()))
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    moments = state["optimizer"]["state"]
    assert moments.keys() == trained
    assert all(moments[name].keys() == {"step", "exp_avg", "exp_avg_sq"} for name in trained)
    assert {float(moment["step"]) for moment in moments.values()} == {2.0}
    assert state["scheduler"] == trainer.scheduler.state_dict()
    assert state["scaler"] is None  # of fp16 alone; see below
    assert (state["step"], state["steps_per_epoch"], state["processes"]) == (2, 1, 1)  # 12 pictures, 8 a step
    assert (state["global_batch"], state["pictures"]) == (8, 12)
    assert [row["epoch"] for row in state["history"]] == [1]  # the second one's evaluation comes after it
    assert state["config"] == trainer.config.as_dict() | {"output": state["config"]["output"]}
    assert state["description"] == trainer.description
    assert state["revision"] == resume.revision()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", state["revision"]), "the tests run in a checkout"
    generators = torch.load(folder / "rank_00000.pt", weights_only=True)
    assert_same(generators["torch"], torch.get_rng_state())
    assert generators["python"] == random.getstate()
    assert_same(generators["numpy"][1], torch.from_numpy(np.random.get_state()[1].astype(np.int64)))  # noqa: NPY002
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert manifest["step"] == 2
    assert manifest["files"].keys() == {checkpoint.STATE, "rank_00000.pt"}


def test_the_loss_scale_comes_back(quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 needs an accelerator; its scaler does not."""
    settings = [*settings_of(tmp_path / "run"), "--resume", "auto"]
    assert quick_run("--epochs", "1")[0] == 0
    build = parallel.build_accelerator

    def scaled(*args: object, **kwargs: object) -> object:
        accelerator = build(*args, **kwargs)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
        return accelerator

    monkeypatch.setattr(parallel, "build_accelerator", scaled)
    settings += ["--epochs", "1"]
    trainer = Trainer(parse_command_line(settings))
    trainer.accelerator.scaler.load_state_dict({**trainer.accelerator.scaler.state_dict(), "scale": 2.0**5})
    trainer.step += 1
    trainer.save()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert Trainer(parse_command_line(settings)).accelerator.scaler.state_dict()["scale"] == 2.0**5


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    history = [{"step": step, "top1": top1} for step, top1 in ((10, 50.0), (20, 70.0), (30, 70.0), (40, 60.0))]
    for step in range(5, 50, 5):
        checkpoint.step_folder(tmp_path, step).mkdir(parents=True)

    def kept(**settings: int) -> list[int]:
        checkpoint.prune(tmp_path, history, **settings)
        return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)]

    assert kept(keep_last=3, keep_best=3) == [20, 30, 35, 40, 45]
    assert kept(keep_last=2, keep_best=1) == [20, 40, 45]  # of two equal ones the first, as in model_best
    assert kept(keep_last=1, keep_best=0) == [45]
    assert [path.name for path in (tmp_path / checkpoint.CHECKPOINTS).iterdir()] == ["step_00000045"]


def test_a_run_keeps_its_last_and_its_best(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run("--epochs", "4", "--output.keep_last", "2", "--output.keep_best", "1")[0] == 0
    steps = {checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")}
    best = json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["best"]["epoch"]
    assert steps == {9, 12} | {3 * best}


@pytest.mark.slow
def test_two_runs_in_one_folder_at_the_same_time(pictures: Path, tmp_path: Path) -> None:
    result = forked_runs("locked", pictures, tmp_path)
    assert (result["first"], result["second"]) == ([0, 0], [2, 2])
    said = result["said"]
    assert said.count("another process is training into") == 2
    assert "Traceback" not in said
    assert "lost contact" not in said
    assert_nothing_else(tmp_path / "run")


def test_overwrite_starts_anew(quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick_run(*RANDOM, "--epochs", "1", "--seed", "1")[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "anew")
    assert quick_run(*RANDOM, "--epochs", "3")[0] == 0

    class Killed(Exception):
        pass

    def die(*args: object, **settings: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("classification.trainer.evaluate", die)
        with pytest.raises(Killed):
            quick_run(*RANDOM, "--epochs", "1", "--seed", "1", "--overwrite")
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000003"]
    assert quick_run(*RANDOM, "--epochs", "1", "--seed", "1", "--resume", "auto")[0] == 0
    assert_same(learned(tmp_path / "anew"), learned(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / checkpoint.METRICS).read_text())["epochs"] == 1


def test_an_overwritten_run_is_there_until_the_new_one_is_saved(
    quick_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quick_run()[0] == 0
    before = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")]
    full_disk_for(checkpoint.STATE, monkeypatch, from_step=0)
    assert quick_run("--seed", "1", "--overwrite")[0] == 2
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == before
    assert checkpoint.damage(newest(tmp_path / "run")) is None
    assert (tmp_path / "run" / checkpoint.LAST_WEIGHTS).exists()


def test_going_back_gives_up_what_came_after(quick_run: Run, tmp_path: Path) -> None:
    """Else `--resume auto` would go on with the try that was given up."""
    options = (*RANDOM, "--epochs", "3", "--output.keep_last", "9")
    assert quick_run(*options)[0] == 0
    three = str(checkpoint.step_folder(tmp_path / "run", 3))
    trainer = Trainer(parse_command_line([*settings_of(tmp_path / "run"), *options, "--resume", three]))
    trainer.step = 4
    trainer.save()
    steps = [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path / "run")]
    assert steps == [2, 3, 4]


def test_a_checkpoint_of_another_run_does_not_mix_with_the_one_here(quick_run: Run, tmp_path: Path) -> None:
    assert quick_run()[0] == 0
    shutil.move(tmp_path / "run", tmp_path / "other")
    assert quick_run("--epochs", "1")[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    status, error = quick_run("--resume", str(newest(tmp_path / "other")))
    assert (status, error.count("\n")) == (2, 1)
    assert f"{tmp_path / 'run'} already holds another run" in error
    assert sorted((tmp_path / "run").rglob("*")) == before


# ---- other settings


def test_changed_settings_are_shown_and_refused(quick_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert quick_run(*RANDOM)[0] == 0
    changed = ("--epochs", "3", "--lr", "1e-4", "--resume", "auto")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    status, error = quick_run(*RANDOM, *changed)
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("error: output.resume: settings differ from the checkpoint's: ")
    assert "optimizer.lr 0.002 there, 0.0001 here; train.epochs 2 there, 3 here. " in error
    assert "--allow-changes" in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    trainer = Trainer(parse_command_line([*settings_of(tmp_path / "run"), *RANDOM, *changed, "--allow-changes"]))
    shown = capsys.readouterr().out
    assert "changed: optimizer.lr 0.002 there, 0.0001 here\n" in shown
    assert "changed: train.epochs 2 there, 3 here\n" in shown
    # they are not only shown
    assert trainer.scheduler.base_values == [1e-4] * len(trainer.raw_optimizer.param_groups)
    assert trainer.scheduler.t_initial == 3 * trainer.steps_per_epoch
    assert trainer.run()["epochs"] == 3


def test_where_and_how_a_run_goes_on_is_free(quick_run: Run, small_data: Path, tmp_path: Path) -> None:
    assert quick_run(*RANDOM)[0] == 0
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(newest(tmp_path / "run"))
    shutil.copytree(small_data, tmp_path / "moved")
    free = (
        "--data-dir", str(tmp_path / "moved"), "--data.workers", "1", "--train.threads", "1", "--device", "auto",
        "--output.log_steps", "1", "--output.keep_best", "0", "--parallel.timeout", "60", "--data.on_error", "skip",
    )  # fmt: skip
    assert quick_run(*RANDOM, *free, "--resume", "auto")[0] == 0
    whole, moved = learned(tmp_path / "whole"), learned(tmp_path / "run")
    for result in (whole, moved):
        del result["state"]["config"]
    assert_same(whole, moved)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--batch-size", "2"), "data.batch_size 4 there, 2 here; global batch 4 there, 2 here"),
        (("--train.accumulation", "2"), "train.accumulation 1 there, 2 here; global batch 4 there, 8 here"),
    ],
)
def test_another_global_batch(options: tuple[str, ...], difference: str, quick_run: Run, tmp_path: Path) -> None:
    assert quick_run(*RANDOM, "--epochs", "4")[0] == 0
    half = str(checkpoint.step_folder(tmp_path / "run", 9))
    status, error = quick_run(*RANDOM, "--epochs", "4", *options, "--resume", half)
    assert (status, error.count("\n")) == (2, 1)
    assert difference in error
    settings = [*settings_of(tmp_path / "run"), *RANDOM, "--epochs", "4", *options, "--resume", half, "--allow-changes"]
    trainer = Trainer(parse_command_line(settings))
    assert trainer.step == 3 * trainer.steps_per_epoch  # as many epochs
    assert trainer.run()["steps"] == 4 * trainer.steps_per_epoch


def test_data_that_lost_pictures_is_not_the_same(quick_run: Run, small_data: Path) -> None:
    assert quick_run()[0] == 0
    (small_data / "train" / "dark" / "5.png").unlink()
    status, error = quick_run("--resume", "auto")
    assert status == 2
    assert "training pictures 12 there, 11 here" in error


def test_events_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    class Full:
        def add_scalar(self, *args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events = EventWriter(tmp_path, wanted=True, step=0)
    events._wanted, events._writer = True, Full()
    events.add(1, loss=1.0)
    events.add(2, loss=1.0)
    events.flush()
    events.close()
    assert capsys.readouterr().out.count("warning: no more TensorBoard events in") == 1
