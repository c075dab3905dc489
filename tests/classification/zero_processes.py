"""What each of two processes does on its own stand-in NPU: the stages of DeepSpeed's ZeRO against DDP.

`python -m torch.distributed.run ... -m tests.classification.zero_processes PICTURES FOLDER`
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from classification.checkpoint import files as checkpoint
from classification.state import TrainStep
from hvt_backbones import InputError
from hvt_backbones.processes import leave_processes
from tests.classification.conftest import QUICK
from tests.classification.processes import Curve, trained

STEPS = 12


def main(pictures: str, folder: str) -> None:
    torch.set_num_threads(1)

    def train(mode: str, *options: str, name: str = "run") -> Curve:
        curve = trained(
            "digits", *QUICK, "--device", "npu", "--data-dir", pictures, "--data.train_split", "few", "--batch-size",
            "4", "--epochs", "1", "--train.amp", "fp32", "--optimizer.clip_grad", "1", "--optimizer.layer_decay", "0.8",
            "--train.ema_decay", "0", "--parallel.mode", mode, "--output-dir", f"{folder}/{mode} {name}", *options,
        )  # fmt: skip
        torch.distributed.barrier()  # until the first has written all files
        return curve

    def weights(mode: str, name: str = "run") -> dict[str, torch.Tensor]:
        return load_file(Path(folder, f"{mode} {name}", checkpoint.LAST_WEIGHTS))

    expected, half = train("ddp"), train("ddp", "--train.amp", "bf16", name="bf16")
    of_ddp = checkpoint.step_folder(Path(folder, "ddp run"), STEPS)
    for mode in ("zero1", "zero2", "zero3"):
        curve = train(mode, "--output.save_steps", "5")
        same(curve, expected)
        for key, value in weights("ddp").items():
            torch.testing.assert_close(weights(mode)[key], value, rtol=1e-3, atol=1e-5)
        same(train(mode, "--train.accumulation", "2", "--batch-size", "2", name="accumulated"), expected)
        in_half = train(mode, "--train.amp", "bf16", name="bf16")
        np.testing.assert_allclose(in_half.losses, half.losses, rtol=5e-3)
        assert in_half.losses != expected.losses
        assert all(value.dtype == torch.float32 for value in weights(mode, "bf16").values())

        path = checkpoint.step_folder(Path(folder, f"{mode} run"), 10)
        resumed = train(mode, "--resume", str(path), name="resumed")
        assert resumed.losses == curve.losses[10:]
        assert resumed.metrics["last"] == curve.metrics["last"]
        assert all(torch.equal(value, weights(mode)[key]) for key, value in weights(mode, "resumed").items())
        with pytest.raises(InputError, match="DeepSpeed's state fits its own mode and processes alone"):
            train(mode, "--resume", str(of_ddp), "--allow-changes", name="of ddp")
        bad_step(mode, train)
    averaged = train("zero2", "--train.ema_decay", "0.9", name="average")
    np.testing.assert_allclose(averaged.losses, expected.losses, rtol=1e-5)
    assert averaged.metrics["last"]["val_loss"] != expected.metrics["last"]["val_loss"]


def same(curve: Curve, expected: Curve) -> None:
    assert len(curve.losses) == STEPS
    np.testing.assert_allclose(curve.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(curve.norms, expected.norms, rtol=1e-5)
    assert curve.metrics["last"]["val_loss"] == pytest.approx(expected.metrics["last"]["val_loss"], rel=1e-4)


def bad_step(mode: str, train: Any) -> None:
    """A picture that is no number costs its step, not the run."""
    step, steps = TrainStep.__call__, count(1)

    def spoil(self: TrainStep, group: Any, *arguments: Any) -> Any:
        if next(steps) == 3:
            group[0].images[0] = torch.nan
        return step(self, group, *arguments)

    TrainStep.__call__ = spoil
    curve = train(mode, name="bad step")
    TrainStep.__call__ = step
    assert curve.metrics["skipped_steps"] == 1
    assert np.isfinite(np.delete(curve.losses, 2)).all()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_processes()
