"""The memory that is tracked on fake tensors is what a real step takes, and `hvt plan` chooses by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, scaling
from benchmarks import plan as measurements
from classification import checks
from classification.command_line import parse_command_line
from hvt_backbones import InputError, create_backbone, create_classifier, create_simmim
from hvt_backbones.cli import main
from hvt_backbones.ops import eager, use_attention
from hvt_backbones.plan import (
    STRATEGIES,
    Plan,
    Strategy,
    byte_count,
    cheapest,
    choose_strategies,
    describe_step,
    recipe,
)
from hvt_backbones.sharding import blocks_of
from hvt_backbones.step_memory import Memory, Step, track

from .conftest import ROOT

CPU = torch.device("cpu")
GIB = 2**30
WINDOWED = {"embed_dim": 16, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
NARROW = {
    "swin_tiny": WINDOWED,
    "swinv2_tiny_window8": WINDOWED,
    "video_swin_tiny": {**WINDOWED, "window_size": (2, 4, 4)},
    "pvt_v2_b1": {"embed_dims": (16, 24), "depths": (2, 1), "sr_ratios": (4, 2), "num_heads": (1, 2)},
}


@dataclass(frozen=True, kw_only=True)
class Narrow(Step):
    """With few channels and blocks."""

    def model(self) -> Any:
        create = {"detection": create_backbone, "simmim": create_simmim}.get(self.task, create_classifier)
        return create(self.name, **NARROW[self.name])


def narrow(name: str, *size: int, task: str = "classification", precision: str = "fp32", device: str = "cpu") -> Narrow:
    return Narrow(name=name, task=task, size=size, batch=3, precision=precision, device=device)


def measured(step: Step, recompute: str | None) -> int:
    """Bytes at the highest point of a real step, by the profiler."""

    def build() -> measure.Work:
        model = step.model()
        model.set_grad_checkpointing(recompute or False)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        images = torch.randn(step.batch, 3, *step.size)

        def work() -> None:
            step.run(model, images)
            optimizer.step()
            optimizer.zero_grad()

        return work

    return measure.peak_memory(build, CPU)


# ---- tracked and measured ----


@pytest.mark.parametrize(
    ("step", "recompute"),
    [
        (narrow("swin_tiny", 96, 96), None),
        (narrow("swinv2_tiny_window8", 100, 76), "block"),
        (narrow("swinv2_tiny_window8", 64, 64, precision="bf16"), "attention"),
        (narrow("swin_tiny", 64, 96, task="simmim"), None),
        (narrow("pvt_v2_b1", 96, 64, task="detection"), None),
        (narrow("video_swin_tiny", 6, 60, 60, task="video"), None),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_tracked_is_measured(step: Narrow, recompute: str | None) -> None:
    assert track(step, recompute=recompute).total == pytest.approx(measured(step, recompute), rel=0.03)


def test_tracking_leaves_nothing_behind() -> None:
    step, images = narrow("swin_tiny", 64, 64), torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)
    model = step.model().eval()
    before = model(images)
    kept = [dict(cache) for cache in eager._caches]
    track(step, devices=2, sharded=True)
    assert [dict(cache).keys() for cache in eager._caches] == [cache.keys() for cache in kept]
    assert all(type(tensor) is torch.Tensor for cache in eager._caches for tensor in cache.values())
    assert not eager.pretended()
    assert not torch.distributed.is_initialized()
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_devices_divide_what_is_kept_and_exchange_it() -> None:
    step = narrow("swin_tiny", 64, 64, device="cuda")
    model = step.model()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    of_blocks = sum(parameter.nbytes for block in blocks_of(model) for parameter in block.parameters())
    one, copies, shards = track(step), track(step, devices=4), track(step, devices=4, sharded=True)
    assert one.parameters == copies.parameters == copies.gradients == weights
    assert one.optimizer == pytest.approx(2 * weights, rel=0.01)
    assert (one.communication, copies.communication) == (0, 0)
    assert (one.traffic, copies.traffic) == (0, 2 * weights * 3 // 4)
    for kind in ("parameters", "optimizer"):  # each shard is rounded up
        assert getattr(shards, kind) == pytest.approx(getattr(one, kind) / 4, rel=0.05)
    assert one.activations <= shards.activations < one.activations + weights  # with gradients until they are reduced
    assert 0 < shards.communication < weights
    frameworks = track(replace(step, task="detection"), devices=4)
    assert frameworks.communication == frameworks.parameters < frameworks.gradients + frameworks.communication
    # blocks are gathered forward and backward, what no block has once, and all gradients are reduced; shards are padded
    assert shards.traffic == pytest.approx((2 * weights + of_blocks) * 3 / 4, rel=0.02)


def test_what_is_recomputed_is_not_kept() -> None:
    step = narrow("swin_tiny", 128, 128, device="cuda")
    kept = [track(step, recompute=recompute).activations for recompute in (None, "mlp", "block")]
    assert kept[0] > 1.2 * kept[1] > 1.4 * kept[2]


def test_attention_on_cuda_keeps_no_logits() -> None:
    """Of windows as large as half a map, which are more than all else: only the bias's gradient has their size."""
    arch = {"embed_dim": 16, "depths": (1,), "num_heads": (8,), "window_size": 16}

    @dataclass(frozen=True, kw_only=True)
    class Wide(Step):
        def model(self) -> Any:
            return create_classifier(self.name, **arch)

    step = Wide(name="swin_tiny", task="classification", size=(128, 128), batch=8, precision="fp32", device="cuda")
    logits = 4 * 8 * 4 * 8 * 256**2  # float32, images, windows, heads
    assert logits < track(step).activations < 1.6 * logits
    with use_attention("reference"):
        assert track(step).activations > 3 * logits


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2+block"])
def test_tracked_is_measured_on_two_processes(way: str) -> None:
    processes, sharded, recompute = measurements.WAYS[way]
    step = describe_step("pvt_v2_b1", image_size=(160,), batch=4, device="cpu")
    real = measurements.measured(step, recompute, processes, sharded=sharded)
    assert track(step, recompute=recompute, devices=processes, sharded=sharded).total == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["peers_h200_bfloat16.json", "peers_h200_float32.json"])
def test_tracked_is_what_a_gpu_took(file: str) -> None:
    rows = list(measurements.compare_recorded(ROOT / "benchmarks" / "results" / file))
    assert len(rows) == 4
    assert all(0.9 < row["ratio"] < 1.1 for row in rows), rows


# ---- the choice ----


def known(total: int, **other: int) -> Memory:
    return Memory(parameters=4 * GIB, gradients=4 * GIB, optimizer=8 * GIB, activations=total - 16 * GIB, **other)


def made_up(devices: int = 8, *, batch: int = 2) -> Plan:
    """Replicas take 36 and 26 GiB, shards 22 and 12 GiB, with nothing and with blocks recomputed."""
    step = describe_step("swin_base", image_size=(224,), batch=batch)
    shards = Memory(parameters=GIB // 2, gradients=GIB // 2, optimizer=GIB, activations=20 * GIB)
    return Plan(
        step,
        devices,
        {
            (None, False): known(36 * GIB),
            ("block", False): known(26 * GIB),
            (None, True): shards,
            ("block", True): replace(shards, activations=10 * GIB),
        },
    )


def test_the_cheapest_recomputes_least_then_exchanges_least() -> None:
    strategies = choose_strategies([], "classification", "cuda", 8)
    assert [str(one) for one in strategies][:6] == ["ddp", "zero1", "zero2", "fsdp2", "zero3", "ddp+block"]
    assert [str(one) for one in strategies][-2:] == ["fsdp2-offload", "fsdp2-offload+block"]
    plan = made_up()
    fitting = {40: "ddp", 31: "zero2", 23: "fsdp2", 21: "zero2+block", 13: "fsdp2+block", 11: "fsdp2-offload+block"}
    for gibibytes, name in fitting.items():
        assert str(cheapest(plan, strategies, gibibytes * GIB)) == name, gibibytes


def test_deepspeed_divides_more_with_each_stage() -> None:
    plan = made_up()
    share, buffer = GIB // 2, 4 * 500_000_000
    stages = [plan.memory(Strategy(f"zero{stage}")) for stage in (1, 2, 3)]
    assert [one.parameters for one in stages] == [4 * GIB + share, 4 * GIB + share, 2 * share]
    assert [one.gradients for one in stages] == [4 * GIB + share, share, share]
    assert [one.optimizer for one in stages] == [GIB] * 3
    assert [one.communication for one in stages] == [buffer, buffer, buffer + 4_000_000_000]


@pytest.mark.slow
def test_where_nothing_fits_the_nearest_that_does_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--image-size 96 --batch 8 --strategy ddp+block --devices 1"
    total = track(describe_step("pvt_v2_b0", image_size=(96,), batch=8), recompute="block").total
    assert main(["plan", "pvt_v2_b0", *command.split(), "--memory", f"{total / 2**20 - 3:.6f}MiB"]) == 2
    out, error = capsys.readouterr()
    assert "ddp+block" in out
    assert error.startswith("error: pvt_v2_b0 fits 0.0")
    assert error.count("\n") == 1
    assert "the nearest that fits is 2 devices with fsdp2+block, 0.0" in error
    for changes, near in ((["--task", "detection"], "batch 7 with ddp+block"), (["--memory", "1MiB"], "more memory")):
        given = ["--memory", f"{total / 2**20 - 3:.6f}MiB", *changes]
        assert main(["plan", "pvt_v2_b0", *command.split(), *given]) == 2
        assert near in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "task"),
    [("ddp", None), ("fsdp2+block", "simmim"), ("zero2+attention", None), ("fsdp2-offload+block", None)],
)
def test_the_trainer_takes_the_recipe(
    name: str, task: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda package: package)  # also where there is no DeepSpeed
    strategy = {str(one): one for one in STRATEGIES}[name]
    step = describe_step("swinv2_base_window8", task=task, image_size=(256, 384), batch=6)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(step, strategy, 4))
    config = parse_command_line([str(file), "--data.kind", "synthetic"])
    assert config.model.name == "swinv2_base_window8"
    assert config.model.grad_checkpointing == (strategy.recompute or False)
    assert config.data.input_size == (3, 256, 384)
    assert (config.data.batch_size, config.train.amp) == (6, "bf16")
    assert config.train.task == (task or "classification")
    assert config.parallel.mode == strategy.mode.partition("-")[0]
    assert config.parallel.cpu_offload == ("offload" in strategy.mode)


def test_a_configuration_takes_the_lines_for_a_backbone() -> None:
    step = describe_step("pvt_v2_b1", task="detection", image_size=(800, 1216), batch=2)
    settings: dict[str, dict] = {}
    exec(recipe(step, Strategy("ddp", "block"), 8), settings)
    assert settings["model"] == {"backbone": {"with_cp": "block", "max_logits": None}}
    assert settings["train_dataloader"] == {"batch_size": 2}


@pytest.mark.slow
def test_swinv2_giant_at_1536_in_40_gb() -> None:
    """The three parts of the paper (arXiv:2111.09883, Sec. 3.4): ZeRO, recomputing, sequential self-attention."""
    step = describe_step("swinv2_giant", image_size=(1536,), batch=1, window_size=48, max_logits=2**26)
    whole, limit = Plan(step, 8), byte_count("40GB")
    combined = Strategy("zero2", "block")

    def devices(strategy: Strategy) -> int | None:
        """The fewest with which it fits."""
        fitting = (n for n in (*range(2, 65), 1024) if replace(whole, devices=n).memory(strategy).total <= limit)
        return next(fitting, None)

    assert whole.memory(combined).total <= limit
    assert devices(combined) == 4
    assert devices(Strategy("ddp", "block")) is None  # without ZeRO
    at_once = Plan(replace(step, max_logits=None), 8).memory(combined)
    assert at_once.total > limit
    assert at_once.activations > 3 * whole.memory(combined).activations
    # without recomputing, in windows of 8 that need no sequential attention
    small = Plan(describe_step("swinv2_giant", image_size=(1536,), batch=1), 8)
    assert small.memory(Strategy("zero2")).activations > limit


def test_scaling_follows_from_the_plan_and_the_rates() -> None:
    step = describe_step("pvt_v2_b0", image_size=(64,), batch=2)
    *_, row = scaling.rows([step], [16])
    name, batch, devices, strategy, memory, sent, computing, exchanging, hours = row.strip("| ").split(" | ")
    whole = Plan(step, 16).memory(Strategy("ddp"))
    assert (name, batch, devices, strategy) == ("pvt_v2_b0, 64", "2", "16", "`ddp`")
    assert (float(memory), float(sent)) == pytest.approx((whole.total / GIB, whole.traffic / GIB), abs=0.01)
    assert float(computing) == pytest.approx(2 * 3 * scaling.operations(step) / scaling.OPERATIONS, abs=1e-3)
    assert float(exchanging) == pytest.approx(whole.traffic / scaling.BETWEEN, abs=1e-3)
    steps = scaling.IMAGENET_22K / 2 / 16 / 3600
    assert [float(h) / steps for h in hours.split(" to ")] == pytest.approx(
        [max(float(computing), float(exchanging)), float(computing) + float(exchanging)], abs=2e-3
    )


# ---- the command ----


def test_plan_prints_a_table_the_cheapest_and_its_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    command = "--image-size 64 --batch 2 --devices 2 --memory 1GiB --strategy fsdp2 ddp+block"
    assert main(["plan", "pvt_v2_b0", *command.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pvt_v2_b0, classification, bf16 on cuda, batch 2 of 64x64 on each of 2 devices"
    assert lines[2].split()[0] == "strategy"
    assert [line.split()[0] for line in lines[3:5]] == ["fsdp2", "ddp+block"]
    for line in lines[3:5]:
        *kinds, total, fits, _ = line.split()[1:]
        assert sum(map(float, kinds)) == pytest.approx(float(total), abs=0.03)
        assert fits == "yes"
    assert lines[6].startswith("the cheapest that fits: fsdp2, 0.0")
    assert lines[-1] == "parallel: {mode: fsdp2}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "swin_tinny"}, "unknown model 'swin_tinny'"),
        ({"--memory": "40"}, "--memory 40: is no amount of memory"),
        ({"--memory": "0GiB"}, "--memory 0GiB: is no amount of memory"),
        ({"--memory": "40Gb/s"}, "is no amount of memory"),
        ({"--image-size": "3"}, "smaller than one 4x4 patch"),
        ({"--image-size": "100", "--task": "simmim"}, "SimMIM needs multiples of 32"),
        ({"model": "pvt_v2_b0", "--task": "simmim"}, "SimMIM is for Swin and SwinV2"),
        ({"--image-size": "10000"}, "--image-size 10000: give at most 8192"),
        ({"--image-size": "0"}, "'0' is not a whole number from 1"),
        ({"--batch": "70000"}, "--batch 70000: give at most 65536"),
        ({"--devices": "100000"}, "--devices 100000: give at most 65536"),
        ({"--frames": "8"}, "--frames 8 is of clips"),
        ({"--task": "video"}, "--task video is not for swin_tiny, which takes images"),
        ({"model": "video_swin_tiny", "--task": "detection"}, "which takes clips: give --task video"),
        ({"--strategy": "fsdp3"}, "unknown strategy 'fsdp3': did you mean fsdp2"),
        ({"--strategy": "fsdp2"}, "strategy 'fsdp2' is not for classification on 1 cuda device ("),
        (
            {"--devices": "2", "--strategy": "zero1", "--device": "cpu"},
            "strategy 'zero1' is not for classification on 2 cpu devices",
        ),
        ({"--devices": "2", "--strategy": "zero1", "--task": "detection"}, "strategy 'zero1' is not for detection"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--image-size": "64", "--batch": "1", "--devices": "1", "--memory": "1GiB"} | changes
    model = given.pop("model", "swin_tiny")
    assert main(["plan", model, *(word for pair in given.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_amounts_of_memory() -> None:
    assert [byte_count(text) for text in ("40GiB", "40GB", "1.5 MiB", "80gb")] == [
        40 * GIB, 40 * 10**9, 3 * 2**19, 80 * 10**9,
    ]  # fmt: skip
    with pytest.raises(InputError, match="is no amount"):
        byte_count("GiB")
