"""Training runs of MMEngine that stop and go on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from torch import Tensor, nn

import hvt_backbones as hvt

from .models import build, randomise

PAIRS = ["swin", "pvt_v2", "twins_svt"]
CUSTOM_KEYS = {"norm": {"decay_mult": 0.0}, "bbox_head": {"lr_mult": 3.0}, "decode_head": {"lr_mult": 3.0}}


class Regression(nn.Module):
    """A backbone under the keys of a detector, with the interface that MMEngine's loop asks for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.bbox_head = nn.Sequential(nn.Conv2d(64, 4, 1), nn.BatchNorm2d(4))

    def train_step(self, data: Tensor, optim_wrapper) -> dict[str, Tensor]:
        maps = self.backbone(data)
        loss = self.bbox_head(maps[-1]).square().mean() + sum(stage.square().mean() for stage in maps)
        optim_wrapper.update_params(loss)
        return {"loss": loss.detach()}


class Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def regression(family: str, *, ours: bool) -> Regression:
    method = "retinanet" if family in ("swin", "pvt_v2") else "fpn"
    # in float32 Adam would turn the rounding errors of keys' biases, whose gradients are zero, into steps
    return Regression(build(method, family, ours=ours, drop_path_rate=0.0).backbone).double()


def train(
    model: Regression,
    folder: Path,
    *,
    steps: int,
    resume_from: str | None = None,
    paramwise: dict | None = None,
    hook=True,
) -> Regression:
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader={
            "batch_size": 1,
            "num_workers": 0,
            "dataset": Pictures(),
            "collate_fn": {"type": "default_collate"},
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg={"by_epoch": False, "max_iters": steps},
        optim_wrapper={
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.1},
            "paramwise_cfg": paramwise,
        },
        param_scheduler={"type": "LinearLR", "start_factor": 0.1, "end": 6, "by_epoch": False},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 3, "by_epoch": False}},
        custom_hooks=[{"type": "HVTResumeHook"}] if hook else [],
        default_scope="mmengine",
        experiment_name=f"{folder.name}_{steps}",
        load_from=resume_from,
        resume=resume_from is not None,
    )
    runner.train()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "paramwise"), [("swin", None), *((family, {"custom_keys": CUSTOM_KEYS}) for family in PAIRS)]
)
def test_a_run_goes_on_with_our_backbone(family: str, paramwise: dict | None, tmp_path: Path) -> None:
    theirs = randomise(regression(family, ours=False))
    whole = train(copy.deepcopy(theirs), tmp_path / "whole", steps=6, paramwise=paramwise)
    train(theirs, tmp_path / "first", steps=3, paramwise=paramwise)
    ours = regression(family, ours=True)
    path = str(tmp_path / "first" / "iter_3.pth")
    train(ours, tmp_path / "second", steps=6, resume_from=path, paramwise=paramwise)
    expected = regression(family, ours=True)
    expected.load_state_dict(whole.state_dict())
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_our_own_run_goes_on(tmp_path: Path) -> None:
    ours = randomise(regression("swin", ours=True))
    whole = train(copy.deepcopy(ours), tmp_path / "whole", steps=6, hook=False)
    train(ours, tmp_path / "first", steps=3, hook=False)
    path = str(tmp_path / "first" / "iter_3.pth")
    for hook in (False, True):
        resumed = regression("swin", ours=True)
        train(resumed, tmp_path / f"second_{hook}", steps=6, resume_from=path, hook=hook)
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_a_state_that_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    theirs = regression("swin", ours=False)
    theirs.backbone.frozen_stages = 0
    theirs.train()
    # MMEngine leaves frozen parameters out where there are rules for parameters
    train(theirs, tmp_path / "first", steps=3, paramwise={"norm_decay_mult": 0.0})
    path = str(tmp_path / "first" / "iter_3.pth")
    with pytest.raises(hvt.WeightsError, match="the optimiser of the checkpoint has .* start the run anew"):
        train(regression("swin", ours=True), tmp_path / "second", steps=6, resume_from=path)
