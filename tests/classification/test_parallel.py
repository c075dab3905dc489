"""Several processes: the same training as one, whole checkpoints, exact evaluation, and an end when one is lost."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from classification.checkpoint import files as checkpoint
from classification.command_line import parse_command_line
from classification.config import ParallelConfig, TrainConfig
from classification.distributed import build_accelerator
from classification.export import main as export
from hvt_backbones import InputError, load_weights
from hvt_backbones.device import DISTRIBUTED_BACKENDS
from hvt_backbones.model_file import open_model
from tests.classification.conftest import QUICK
from tests.classification.processes import Curve, as_from_a_shell, die_at, in_processes, trained
from tests.npu.standin_environment import standin_environment
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PARALLEL = ["ddp-2", "ddp-4", "fsdp2-2", "fsdp2-4"]
GLOBAL_BATCH = 8
# What depends on the rank if anything does: augmentation (the recipe's), an average, clipping, rates by layer. Adam
# divides a gradient by its own size: with its usual eps, one that is rounding alone (of a hidden unit that no picture
# reaches) would move its weight by whole steps, in a direction of its own on each machine and number of processes.
SETTINGS = (
    *QUICK, "--epochs", "1", "--train.ema_decay", "0.9", "--optimizer.clip_grad", "1", "--optimizer.layer_decay", "0.8",
    "--optimizer.eps", "1e-5", "--output.tensorboard", "false",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of noise: 400 pictures to train on (50 steps), 96 in `few` (12 steps), 13 held out."""
    root = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for split, count in (("train", 400), ("few", 96), ("val", 13)):
        for index in range(count):
            folder = root / split / f"class {index % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (36, 40, 3), dtype=np.uint8) // (1 + index % 4)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


Run = Callable[..., Curve]


@pytest.fixture
def train(pictures: Path, tmp_path: Path) -> Run:
    """Train on `pictures` into `tmp_path / name`, by default the short epoch."""
    return lambda *arguments, **named: _train(pictures, tmp_path, *arguments, **named)


def _train(
    pictures: Path,
    folder: Path,
    layout: str,
    *options: str,
    name: str = "run",
    split: str = "few",
    accumulation: int = 1,
) -> Curve:
    mode, processes = layout.split("-")
    batch = GLOBAL_BATCH // int(processes) // accumulation
    curves = in_processes(
        int(processes), trained, "digits", *SETTINGS, "--data-dir", str(pictures), "--data.train_split", split,
        "--parallel.mode", mode, "--batch-size", str(batch), "--train.accumulation", str(accumulation),
        "--output-dir", str(folder / name), *options,
    )  # fmt: skip
    assert all(curve.losses == curves[0].losses for curve in curves)
    return curves[0]


@pytest.fixture(scope="module")
def alone(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curve, Path]:
    """50 steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return _train(pictures, folder, "ddp-1", split="train"), folder / "run"


@pytest.fixture(scope="module")
def alone_briefly(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """12 steps of one process."""
    return _train(pictures, tmp_path_factory.mktemp("alone"), "ddp-1")


def assert_same(curve: Curve, expected: Curve, *, start: int = 0, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(curve.losses, expected.losses[start:], rtol=rtol)
    np.testing.assert_allclose(curve.norms, expected.norms[start:], rtol=rtol)


# ---- the same training


@pytest.mark.slow
@pytest.mark.parametrize("layout", PARALLEL)
def test_many_processes_train_as_one(layout: str, alone: tuple[Curve, Path], train: Run, tmp_path: Path) -> None:
    expected, folder = alone
    curve = train(layout, split="train")
    assert len(curve.losses) == 50
    assert min(curve.norms) < 1 < max(curve.norms)  # some steps are clipped, some are not
    assert_same(curve, expected)
    assert curve.metrics["best"]["val_images"] == 13
    assert curve.metrics["best"]["val_correct"] == expected.metrics["best"]["val_correct"]
    assert curve.metrics["best"]["val_loss"] == pytest.approx(expected.metrics["best"]["val_loss"], rel=1e-5)
    weights, of_one = (load_file(path / checkpoint.LAST_WEIGHTS) for path in (tmp_path / "run", folder))
    assert weights.keys() == of_one.keys()
    for key, value in weights.items():  # the average's
        torch.testing.assert_close(value, of_one[key], rtol=1e-3, atol=1e-5)
    model = open_model(str(folder / checkpoint.LAST_WEIGHTS)).classifier()
    load_weights(model, tmp_path / "run" / checkpoint.LAST_WEIGHTS)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp-2", "fsdp2-2"])
def test_accumulation_is_a_larger_batch(layout: str, alone_briefly: Curve, train: Run) -> None:
    assert_same(train(layout, accumulation=2), alone_briefly)


def trained_without_building(*options: str) -> Curve:
    """As `trained`, in processes of which the first alone may build a model."""
    from classification import trainer

    if os.environ.get("RANK", "0") != "0":
        trainer.build_model = None
    return trained(*options)


@pytest.mark.slow
def test_the_first_process_builds_the_model_and_reads_its_weights_for_all(
    alone: tuple[Curve, Path], pictures: Path, tmp_path: Path
) -> None:
    """Also what is no weight: the window of which a SwinV2's position biases are."""
    options = (
        "digits", *SETTINGS, "--data-dir", str(pictures), "--data.train_split", "few", "--model.pretrained",
        str(alone[1] / checkpoint.LAST_WEIGHTS), "--model.overrides.window_size", "2", "--model.freeze_stages", "1",
    )  # fmt: skip
    settings = ("--batch-size", str(GLOBAL_BATCH), "--output-dir", str(tmp_path / "one"))
    (expected,) = in_processes(1, trained, *options, *settings)
    options += ("--parallel.mode", "fsdp2", "--batch-size", str(GLOBAL_BATCH // 2))
    curve, of_other = in_processes(2, trained_without_building, *options, "--output-dir", str(tmp_path / "two"))
    assert curve.losses == of_other.losses
    assert_same(curve, expected)
    options += ("--model.pretrained", str(tmp_path / "nothing.safetensors"))
    for said in in_processes(2, refused, *options, "--output-dir", str(tmp_path / "none")):
        assert "nothing.safetensors" in said


def refused(*options: str) -> str:
    with pytest.raises(InputError) as error:
        trained(*options)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp-2", "fsdp2-2"])
def test_bf16(layout: str, alone_briefly: Curve, train: Run) -> None:
    expected = train("ddp-1", "--train.amp", "bf16", name="alone")
    curve = train(layout, "--train.amp", "bf16")
    np.testing.assert_allclose(curve.losses, expected.losses, rtol=1e-3)
    assert curve.losses != alone_briefly.losses
    np.testing.assert_allclose(curve.losses, alone_briefly.losses, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("ddp-1", ["fsdp2-4"]), ("ddp-2", ["fsdp2-2"]), ("fsdp2-2", ["ddp-2", "ddp-1"])]
)
def test_a_checkpoint_fits_any_layout(
    before: str, after: list[str], alone_briefly: Curve, train: Run, tmp_path: Path
) -> None:
    train(before, "--output.save_steps", "5", name="before")
    path = checkpoint.step_folder(tmp_path / "before", 10)
    for layout in after:
        curve = train(layout, "--resume", str(path), "--allow-changes", name=layout)
        assert_same(curve, alone_briefly, start=10)
        assert curve.metrics["last"]["val_loss"] == pytest.approx(alone_briefly.metrics["last"]["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_shards_fit_any_number_of_processes(alone_briefly: Curve, train: Run, tmp_path: Path) -> None:
    train("fsdp2-2", "--output.save_steps", "5", "--output.sharded", "true", name="before")
    path = checkpoint.step_folder(tmp_path / "before", 10)
    state = checkpoint.load_state(path)
    assert state["model"] is state["ema"] is None
    assert len(list((path / "shards").glob("*.distcp"))) == 2
    for layout, sharded in (("fsdp2-4", "true"), ("fsdp2-2", "false"), ("fsdp2-1", "true")):
        options = ("--resume", str(path), "--allow-changes", "--output.sharded", sharded)
        curve = train(layout, *options, name=f"on {layout}")
        assert_same(curve, alone_briefly, start=10)
        assert curve.metrics["last"]["val_loss"] == pytest.approx(alone_briefly.metrics["last"]["val_loss"], rel=1e-5)
    # one file of them, as the run itself left
    last = checkpoint.list_checkpoints(tmp_path / "before")[-1]
    assert export([str(last), str(tmp_path / "whole.safetensors")]) == 0
    whole, left = (
        load_file(path) for path in (tmp_path / "whole.safetensors", tmp_path / "before" / checkpoint.LAST_WEIGHTS)
    )
    assert whole.keys() == left.keys()
    assert all(torch.equal(whole[key], left[key]) for key in left)
    assert open_model(str(tmp_path / "whole.safetensors")).classifier()


def die_in_shards(*options: str) -> None:
    """The training command, whose rank 1 is killed while it writes its part of the second checkpoint."""
    from classification.checkpoint import manager
    from classification.train import main

    as_from_a_shell()
    write, calls = manager.write_shards, itertools.count(1)

    def fatal(folder: Path, tensors: dict[str, Any]) -> None:
        if next(calls) == 2 and os.environ["RANK"] == "1":
            folder.mkdir(exist_ok=True)
            (folder / "__1_0.distcp").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, tensors)

    manager.write_shards = fatal
    sys.exit(main(options))


@pytest.mark.slow
def test_a_process_killed_while_it_writes_its_shard_loses_nothing(
    pictures: Path, tmp_path: Path, alone_briefly: Curve, train: Run
) -> None:
    options = (
        "digits", *SETTINGS, "--data-dir", str(pictures), "--data.train_split", "few", "--batch-size", "4",
        "--parallel.mode", "fsdp2", "--output.sharded", "true", "--output-dir", str(tmp_path / "run"),
        "--output.save_steps", "3",
    )  # fmt: skip
    failure, said = launch(2, tmp_path / "logs", die_in_shards, *options)
    assert failure.get_first_failure()[1].exitcode == -signal.SIGKILL
    assert "error: lost contact with another process at step 6; the last checkpoint is" in said
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["step_00000003"]
    sharded = ("--output.sharded", "true", "--output.save_steps", "3", "--resume", "auto")
    assert_same(train("fsdp2-4", *sharded, "--allow-changes"), alone_briefly, start=3)


# ---- evaluation


def held_out(*options: str) -> tuple[int, int, float]:
    """Images, right ones and loss of an untrained model."""
    from classification.trainer import Trainer, evaluate

    trainer = Trainer(parse_command_line(options))
    result = evaluate(trainer.learner.evaluated, trainer.val_loader, trainer.accelerator)
    return result.images, result.correct, result.loss


@pytest.mark.slow
@pytest.mark.parametrize("pictures_held_out", [13, 3, 1], ids=lambda count: f"{count}_pictures")
def test_each_picture_counts_once(pictures_held_out: int, tmp_path: Path) -> None:
    """Also where some of the processes have none."""
    options = (
        "digits", *SETTINGS, "--data.kind", "synthetic", "--data.synthetic_images", str(10 * pictures_held_out),
        "--data.synthetic_classes", "4", "--output-dir", str(tmp_path / "run"), "--batch-size",
    )  # fmt: skip
    (expected,) = in_processes(1, held_out, *options, "8")
    assert expected[0] == pictures_held_out
    for mode in ("ddp", "fsdp2"):
        for result in in_processes(4, held_out, *options, "2", "--parallel.mode", mode):
            assert result[:2] == expected[:2]
            assert result[2] == pytest.approx(expected[2], rel=1e-5)


# ---- a process that is lost


def launch(processes: int, logs: Path, function: Callable[..., Any], *arguments: Any) -> tuple[ChildFailedError, str]:
    """Run `function` as torchrun would, with its agent in this process; how it failed, and what all ranks wrote."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.1, start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )  # fmt: skip
    begin = time.monotonic()
    with pytest.raises(ChildFailedError) as failure:
        elastic_launch(config, function)(*arguments)
    assert time.monotonic() - begin < 300  # the other ranks would wait for 600 s
    return failure.value, "".join(path.read_text() for path in sorted(logs.rglob("stderr.log")))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "processes"), [("kill", 2), ("kill", 4), ("raise", 2), ("raise", 4)])
def test_a_lost_process_ends_the_job_by_name(
    how: str, processes: int, pictures: Path, tmp_path: Path, alone_briefly: Curve, train: Run
) -> None:
    options = (
        "digits", *SETTINGS, "--data-dir", str(pictures), "--data.train_split", "few", "--data.workers", "1",
        "--batch-size", str(GLOBAL_BATCH // processes), "--output-dir", str(tmp_path / "run"), "--output.save_steps",
        "3",
    )  # fmt: skip
    failure, said = launch(processes, tmp_path / "logs", die_at, 5, how, *options)
    rank, first = failure.get_first_failure()
    assert rank == 1
    assert first.exitcode == (-signal.SIGKILL if how == "kill" else 1)
    named = [line for line in said.splitlines() if "error: lost contact with another process" in line]
    assert len(named) == processes - 1
    assert all("rank 1 (pid" in line and "step_00000003" in line for line in named)
    if how == "kill":
        curve = train(f"ddp-{processes}", "--output.save_steps", "3", "--resume", "auto")
        assert_same(curve, alone_briefly, start=3)


@pytest.mark.slow
def test_an_unreadable_picture_ends_the_job_by_name(pictures: Path, tmp_path: Path) -> None:
    for name in ("few", "val"):
        (tmp_path / name).symlink_to(pictures / name)
    bad = tmp_path / "train"
    for index in range(4):
        (bad / f"class {index}").mkdir(parents=True)
        for copy in range(8):
            source = pictures / "few" / f"class {index}" / f"{index + 4 * copy}.png"
            (bad / f"class {index}" / f"{copy}.png").write_bytes(source.read_bytes())
    (bad / "class 2" / "5.png").write_bytes(b"not a picture")
    options = (
        "digits", *SETTINGS, "--data-dir", str(tmp_path), "--data.workers", "1", "--batch-size", "2", "--output-dir",
        str(tmp_path / "run"),
    )  # fmt: skip
    failure, said = launch(4, tmp_path / "logs", die_at, 1000, "kill", *options)
    rank, first = failure.get_first_failure()
    assert first.exitcode == 2
    assert [line for line in said.splitlines() if line.startswith("error: ") and "5.png" in line]
    assert f"rank {rank} (pid {first.pid}) ended" in said


def stopped(*options: str) -> str:
    """Rank 1 stops, as a process that hangs does; what the others say of it."""
    from classification.signals import LostContactError
    from classification.state import TrainStep

    step = TrainStep.__call__

    def stop(self: TrainStep, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(self, *arguments)

    TrainStep.__call__ = stop
    with pytest.raises(LostContactError) as lost:
        trained(*options)
    return str(lost.value)


@pytest.mark.slow
def test_a_process_that_does_not_answer(pictures: Path, tmp_path: Path) -> None:
    options = ("digits", *SETTINGS, "--data-dir", str(pictures), "--output-dir", str(tmp_path / "run"))
    begin = time.monotonic()
    said = in_processes(2, stopped, *options, "--parallel.timeout", "30", only=[0])
    assert time.monotonic() - begin > 30
    assert "at step 0" in said[0]
    assert "rank 1 (pid" in said[0]
    assert "was stopped" in said[0]


# ---- launchers


def command(*launcher: str, data: Path, output: Path, batch: int) -> list[str]:
    return [
        sys.executable, "-m", *launcher, "-m", "classification.train", "digits", *SETTINGS, "--data-dir", str(data),
        "--data.train_split", "few", "--batch-size", str(batch), "--output-dir", str(output),
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_torchrun_then_accelerate(pictures: Path, tmp_path: Path) -> None:
    """A rank under torchrun is killed; the run goes on to its end under accelerate."""
    output = tmp_path / "run"
    torchrun = command("torch.distributed.run", "--nproc_per_node", "2", data=pictures, output=output, batch=4)
    torchrun[torchrun.index("--nproc_per_node") : 0] = []
    process = start([*torchrun[:3], "--standalone", *torchrun[3:], "--output.save_steps", "1", "--epochs", "50"])
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.list_checkpoints(output):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        victim = [child for child in _children(process.pid) if _rank(child) == "1"]
        begin = time.monotonic()
        os.kill(victim[0], signal.SIGKILL)
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert time.monotonic() - begin < 300  # the other rank would wait for 600 s
    assert "lost contact with another process at step" in said
    assert f"rank 1 (pid {victim[0]}) ended" in said
    assert "[rank 0] error: " in said
    assert f"(pid: {victim[0]})" in said  # in torchrun's own report

    done = checkpoint.step_of(checkpoint.list_checkpoints(output)[-1])
    accelerate = command(
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
        "no", "--dynamo_backend", "no", data=pictures, output=output, batch=4,
    )  # fmt: skip
    epochs = str(done // 12 + 1)
    process = start(
        [*accelerate, "--output.save_steps", "1", "--epochs", epochs, "--resume", "auto", "--allow-changes"]
    )
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert "on 2 x cpu, ddp" in said
    assert f"resumed after step {done}" in said


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children()]


def _rank(pid: int) -> str | None:
    import psutil

    return psutil.Process(pid).environ().get("RANK")


@pytest.mark.slow
def test_two_nodes(pictures: Path, tmp_path: Path, alone_briefly: Curve) -> None:
    """Two agents of torchrun on one machine, with the command that the README gives."""
    endpoint = f"localhost:{free_port()}"
    nodes = [
        start(
            command(
                "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1",
                "--rdzv_backend", "c10d", "--rdzv_id", "flowers", "--rdzv_endpoint", endpoint,
                data=pictures, output=tmp_path / "run", batch=4,
            )
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        said = [node.communicate(timeout=900)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert all("on 2 x cpu, ddp" in text for text in said)  # accelerate prints once per machine
    weights = load_file(tmp_path / "run" / checkpoint.LAST_WEIGHTS)
    assert all(value.isfinite().all() for value in weights.values())


# ---- devices and DeepSpeed


def test_backends_are_those_of_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import state

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(state.torch.cuda, "is_available", lambda: False)
    backends = {"cpu": state.PartialState._prepare_backend(None, cpu=True)[0]}
    with monkeypatch.context() as patch:
        patch.setattr(state, "is_npu_available", lambda *_: True)
        backends["npu"] = state.PartialState._prepare_backend(None)[0]
    with monkeypatch.context() as patch:
        patch.setattr(state.torch.cuda, "is_available", lambda: True)
        backends["cuda"] = state.PartialState._prepare_backend(None)[0]
    assert backends == DISTRIBUTED_BACKENDS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel.mode", "zero3", "--device", "npu"), "train.ema_decay: "),
        (("--parallel.mode", "zero2", "--device", "npu", "--train.amp", "fp16"), "train.amp: fp16 does not go with"),
    ],
)
def test_modes_that_do_not_go_together(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_command_line(["digits", *options])


def test_deepspeed_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="parallel.mode: zero2 needs an accelerator"):
        build_accelerator(TrainConfig(device="cpu"), ParallelConfig(mode="zero2"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install deepspeed")
def test_deepspeed_trains_as_ddp(pictures: Path, tmp_path: Path) -> None:
    """All stages, through accelerate, in two processes on the stand-in NPU; see zero_processes.py."""
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
         "tests.classification.zero_processes", str(pictures), str(tmp_path)],
        cwd=ROOT, env={"ASCEND_HOME_PATH": str(tmp_path)} | standin_environment(), text=True, timeout=900, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:]
