"""`python -m segmentation.train`, `test`, `predict`, `info` and `export`, on a tiny Semantic FPN and a tiny ADE20K."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from PIL import Image
from torch import nn

from hvt_backbones.exported import load_exported
from runner.checkpoints import read_checkpoint
from runner.devices import Bf16OptimWrapper
from segmentation.export import main as export
from segmentation.predict import main as predict
from segmentation.test import main as evaluate
from segmentation.train import main as train
from tests.dense_runs import (
    CLASSES,
    ROOT,
    SIDE,
    error_line,
    in_two_processes,
    logged,
    torchrun,
    write_program,
)
from tests.npu.standin_environment import standin_environment
from tests.ports import free_port

CPU = ("--device", "cpu")
TILES = ("model.test_cfg.mode=slide", "model.test_cfg.crop_size=(32,32)", "model.test_cfg.stride=(16,16)")


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def evaluated(config: Path, checkpoint: Path, folder: Path, *options: str) -> dict[str, float]:
    assert evaluate([str(config), str(checkpoint), "--work-dir", str(folder), *CPU, *options]) == 0
    return metrics(folder)


@pytest.mark.slow
def test_it_tests_whole_in_tiles_and_averaged(config: Path, trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "iter_4.pth"
    whole = evaluated(config, checkpoint, tmp_path / "whole")
    expected = logged(trained)[-1]
    assert whole["mIoU"] == pytest.approx(expected["mIoU"], abs=0.05)
    tiles = evaluated(config, checkpoint, tmp_path / "tiles", "--cfg-options", *TILES)
    averaged = evaluated(config, checkpoint, tmp_path / "averaged", "--tta")
    assert json.loads((tmp_path / "averaged" / "metrics.json").read_text())["tta"] is True
    assert len({figures["aAcc"] for figures in (whole, tiles, averaged)}) == 3


@pytest.mark.slow
def test_two_processes_train_evaluate_and_resume(config: Path, tmp_path: Path) -> None:
    # BatchNorm would have a mean of its own in each process
    group_norm = ("--cfg-options", "model.decode_head.norm_cfg.type=GN", "model.decode_head.norm_cfg.num_groups=4")
    result = torchrun("segmentation.train", [str(config), "--work-dir", str(tmp_path / "run"), *group_norm])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "GPU number: 2" in result.stdout + result.stderr  # MMEngine's word for processes
    assert [entry["step"] for entry in logged(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4]
    alone = evaluated(config, tmp_path / "run" / "iter_4.pth", tmp_path / "alone", *group_norm)
    together = logged(tmp_path / "run")[-1]
    assert together["mIoU"] == pytest.approx(alone["mIoU"], abs=0.05)

    whole = read_checkpoint(tmp_path / "run" / "iter_4.pth")
    shutil.rmtree(next((tmp_path / "run").glob("2*")))
    (tmp_path / "run" / "iter_4.pth").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")  # the record of the last checkpoint names the folder of before
    (tmp_path / "moved" / "last_checkpoint").write_text(str(tmp_path / "run" / "iter_2.pth"))
    arguments = [str(config), "--work-dir", str(tmp_path / "moved"), "--resume", *group_norm]
    assert in_two_processes("segmentation.train:main", [*arguments, *CPU, "--launcher", "pytorch"]) == [0, 0]
    assert [entry["step"] for entry in logged(tmp_path / "moved") if "loss" in entry] == [3, 4]
    resumed = read_checkpoint(tmp_path / "moved" / "iter_4.pth")
    assert resumed["meta"]["iter"] == 4
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_the_frameworks_own_backbone_goes_on(config: Path, tmp_path: Path) -> None:
    """With a configuration that does not speak of `HVTResumeHook`."""
    cfg = Config.fromfile(config)
    cfg.model.backbone = {
        "type": "SwinTransformer", "embed_dims": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2),
        "window_size": 4, "drop_path_rate": 0.0,
    }  # fmt: skip
    cfg.dump(tmp_path / "theirs.py")
    short = ("--cfg-options", "train_cfg.max_iters=2", "train_cfg.val_interval=9")
    assert train([str(tmp_path / "theirs.py"), "--work-dir", str(tmp_path / "theirs"), *CPU, *short]) == 0
    saved = tmp_path / "theirs" / "iter_2.pth"
    assert train([str(config), "--work-dir", str(tmp_path / "ours"), *CPU, "--resume", str(saved)]) == 0
    assert [entry["step"] for entry in logged(tmp_path / "ours") if "loss" in entry] == [3, 4]
    moments = read_checkpoint(tmp_path / "ours" / "iter_4.pth")["optimizer"]["state"]
    assert {int(values["step"]) for values in moments.values()} == {4}


@pytest.mark.slow
def test_resuming_runs_nothing_that_the_checkpoint_says(config: Path, trained: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof.txt"
    saved = torch.load(trained / "iter_2.pth", weights_only=False)
    saved["meta"]["config"] = f"open({str(proof)!r}, 'w').close()\n" + saved["meta"]["cfg"]
    torch.save(saved, tmp_path / "resumed.pth")
    resumed = ("--resume", str(tmp_path / "resumed.pth"), "--allow-changes")
    options = (*resumed, "--cfg-options", "train_cfg.max_iters=3")
    assert train([str(config), "--work-dir", str(tmp_path / "run"), *CPU, *options]) == 0
    assert [entry["step"] for entry in logged(tmp_path / "run") if "loss" in entry] == [3]
    assert not proof.exists()
    Config.fromstring(saved["meta"]["config"], file_format=".py")  # as MMEngine does when it resumes
    assert proof.exists()


@pytest.mark.slow
def test_the_record_of_the_last_checkpoint_is_not_trusted(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    bad, proof = write_program(tmp_path)
    (tmp_path / "last_checkpoint").write_text(str(bad))
    for options in (("--resume",), ("--cfg-options", "resume=True")):
        assert train([str(config), "--work-dir", str(tmp_path), *CPU, *options]) == 2
        assert "can run any program" in error_line(capfd)
    for main, arguments in ((evaluate, ()), (predict, (str(tmp_path), "--out-dir", str(tmp_path / "out")))):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        assert main([str(config), str(bad), *arguments, *CPU]) == 2
        assert "can run any program" in error_line(capfd)
    assert not proof.exists()


@pytest.mark.slow
def test_predict_writes_overlays_labels_and_shares(config: Path, trained: Path, ade: Path, tmp_path: Path) -> None:
    pictures = ade / "images" / "validation"
    arguments = [str(config), str(trained / "iter_4.pth"), str(pictures), "--out-dir", str(tmp_path), *CPU]
    assert predict(arguments) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert [result["file_name"] for result in results] == sorted(path.name for path in pictures.iterdir())
    names = ("ground", *CLASSES)
    for result in results:
        label_file = Image.open(tmp_path / "labels" / Path(result["file_name"]).with_suffix(".png"))
        labels = np.asarray(label_file)
        assert labels.shape == (SIDE, SIDE) == tuple(result["size"])
        counted = {names[label]: float((labels == label).mean()) for label in np.unique(labels)}
        assert result["classes"] == pytest.approx(counted, abs=1e-6)
        assert list(result["classes"].values()) == sorted(result["classes"].values(), reverse=True)
        colours = np.asarray(label_file.convert("RGB"), dtype=int)
        picture = np.asarray(Image.open(pictures / result["file_name"]), dtype=int)
        overlay = np.asarray(Image.open(tmp_path / "overlays" / result["file_name"]), dtype=int)
        assert np.abs(overlay - (picture + colours) / 2).mean() < 12  # JPEG


def test_each_picture_needs_its_map(config: Path, ade: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    root = shutil.copytree(ade, tmp_path / "ade")
    (root / "annotations" / "training" / "ADE_00000003.png").unlink()
    option = f"train_dataloader.dataset.data_root={root}"
    assert train([str(config), "--cfg-options", option, "--work-dir", str(tmp_path / "run"), *CPU]) == 2
    message = error_line(capfd)
    assert "1 of 8 pictures" in message
    assert "ADE_00000003.png" in message
    shutil.rmtree(root / "annotations")
    assert train([str(config), "--cfg-options", option, "--work-dir", str(tmp_path / "run"), *CPU]) == 2
    message = error_line(capfd)
    assert f"folder {root}/annotations/training does not exist, {root} holds images" in message
    assert "data/ade/ADEChallengeData2016" in message


@pytest.mark.slow
def test_backbone_and_neck_are_exported_for_every_size(config: Path, trained: Path, tmp_path: Path) -> None:
    from mmseg.apis import init_model

    file, checkpoint = tmp_path / "graph.onnx", str(trained / "iter_4.pth")
    assert export([str(config), checkpoint, "--format", "onnx", "--output", str(file), *CPU]) == 0
    graph, segmentor, images = (
        load_exported(file),
        init_model(str(config), checkpoint, "cpu"),
        torch.randn(3, 3, 41, 90),
    )
    with torch.no_grad():
        torch.testing.assert_close(graph(images), tuple(segmentor.extract_feat(images)), rtol=1e-4, atol=1e-4)


def test_tta_needs_its_pipeline(config: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    short = tmp_path / "short.py"
    short.write_text("\n".join(line for line in config.read_text().splitlines() if not line.startswith("tta_pipeline")))
    assert evaluate([str(short), str(trained / "iter_4.pth"), "--tta", *CPU]) == 2
    assert "tta_pipeline" in error_line(capfd)


@pytest.mark.parametrize("channels", [1, 7])
def test_a_running_sum_predicts_what_keeping_every_view_does(channels: int) -> None:
    from mmengine.structures import PixelData
    from mmseg.models import SegTTAModel
    from mmseg.structures import SegDataSample

    from runner.averaging import AveragingTTAModel

    class Drawn(nn.Module):
        out_channels, decode_head, step = channels, Namespace(threshold=0.55), 0

        def test_step(self, data: dict[str, list[SegDataSample]]) -> list[SegDataSample]:
            found = []
            for number, given in enumerate(data["data_samples"]):
                generator = torch.Generator().manual_seed(10 * self.step + number)
                logits = torch.randn(channels, 70, 45 + number, generator=generator)
                sample = SegDataSample(metainfo=given.metainfo)
                sample.seg_logits = PixelData(data=logits)
                sample.pred_sem_seg = PixelData(data=logits.argmax(dim=0, keepdim=True))
                sample.gt_sem_seg = PixelData(data=torch.full((1, 70, 45 + number), number))
                found.append(sample)
            self.step += 1
            return found

    views = [[SegDataSample(metainfo={"img_path": f"{i}.png", "flip": flip}) for i in range(2)] for flip in (0, 1, 0)]
    theirs, ours = (
        kind(module=Drawn()).test_step({"inputs": [[0, 0]] * 3, "data_samples": views})
        for kind in (SegTTAModel, AveragingTTAModel)
    )
    for expected, found in zip(theirs, ours, strict=True):
        assert found.img_path == expected.img_path
        assert torch.equal(found.pred_sem_seg.data, expected.pred_sem_seg.data)
        assert torch.equal(found.gt_sem_seg.data, expected.gt_sem_seg.data)
        assert "seg_logits" not in found  # nothing of the size of all classes stays


def train_spoiled(arguments: list[str]) -> int:
    """`segmentation.train`, where the loss of the second process is no number."""
    parse = BaseModel.parse_losses

    def spoiled(model: nn.Module, losses: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, variables = parse(model, losses)
        return total * (float("nan") if dist.get_rank() == 1 else 1.0), variables

    BaseModel.parse_losses = spoiled
    return train(arguments)


@pytest.mark.slow
def test_the_process_whose_loss_is_no_number_names_its_pictures(
    config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options = ("--max-bad-steps", "2", "--cfg-options", "model.decode_head.norm_cfg.type=GN",
               "model.decode_head.norm_cfg.num_groups=4")  # fmt: skip
    arguments = [str(config), "--work-dir", str(tmp_path), *CPU, "--launcher", "pytorch", *options]
    assert in_two_processes(f"{__name__}:train_spoiled", arguments) == [1, 1]
    line = error_line(capfd)
    assert "training diverged at step 2 " in line
    names = (tmp_path / "bad_batch.txt").read_text().splitlines()
    assert len(names) == 2  # the batch of one process
    assert all(Path(name).is_file() and name in line for name in names)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(x)
        result = self.head(features)
        self.seen += [features.dtype, result.dtype]
        return {"loss": result.mean()}


MISFITS = {
    "neck": ("model.neck.in_channels=[8,16,32,65]", "the backbone swin_tiny gives maps of 8, 16, 32, 64 channels"),
    "head": (
        "model.decode_head.in_channels=[16,16,16,32]",
        "the neck, of which it takes [0, 1, 2, 3], gives maps of 16",
    ),
    "assertion": ("model.neck.num_outs=2", "FPN: num_outs=2: it needs `num_outs >= self.num_ins"),
    # as a tuple the channels are right, and the next mistake is told
    "tuple": ("model.neck.in_channels=(8,16,32,64) model.decode_head.num_classes=2", "num_classes is 2, the training"),
    "index": ("model.decode_head.in_index=[0,1,2,4]", "model.decode_head.in_index is [0, 1, 2, 4], the neck gives 4"),
    "classes": (
        "model.decode_head.num_classes=2",
        "model.decode_head.num_classes is 2, the training data has 3 classes",
    ),
    "no neck": ("model.neck=None", "model.decode_head.in_channels is [16, 16, 16, 16], the backbone swin_tiny, of"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    option, expected = MISFITS[case]
    assert train([str(config), "--work-dir", str(tmp_path), *CPU, "--cfg-options", *option.split()]) == 2
    assert expected in error_line(capfd)


def test_a_batch_norm_of_one_number_is_told(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    cfg = Config.fromfile(config)
    head = {
        "type": "PSPHead",
        "in_channels": 64,
        "in_index": 3,
        "channels": 16,
        "num_classes": 3,
        "pool_scales": (1, 2),
    }
    cfg.model = {**cfg.model, "neck": None, "decode_head": {**head, "norm_cfg": {"type": "BN"}}}
    cfg.train_dataloader.batch_size = 1
    cfg.dump(tmp_path / "pooled.py")
    assert train([str(tmp_path / "pooled.py"), "--work-dir", str(tmp_path / "run"), *CPU]) == 2
    assert "train_dataloader.batch_size is 1: a batch norm " in error_line(capfd)


@pytest.mark.parametrize(
    ("part", "dtypes"),
    [("backbone", [torch.float32, torch.float32]), ("", [torch.bfloat16, torch.bfloat16])],
    ids=["backbone", "whole"],
)
def test_bf16_is_for_its_part_alone_and_comes_back_as_float32(part: str, dtypes: list[torch.dtype]) -> None:
    model = Part()
    wrapper = Bf16OptimWrapper(part=part, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    x, before = torch.randn(3, 4), model.head.weight.detach().clone()
    exact = model.backbone(x)
    with wrapper.optim_context(model):
        rounded = model.backbone(x)
        model.seen.clear()
        loss = model(x)["loss"]
    assert model.seen == dtypes
    assert loss.dtype == torch.float32
    assert torch.equal(rounded, exact) == (part == "")  # called by itself it is not the part
    wrapper.update_params(loss)
    assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.backbone(x), model.backbone(x).float())
    assert "forward" not in vars(model) | vars(model.backbone)


@pytest.mark.slow
def test_slurm_starts_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    arguments = [str(config), "--work-dir", str(tmp_path / "run"), *CPU, "--launcher", "slurm"]
    assert train(arguments) == 2
    assert "the environment lacks SLURM_PROCID" in error_line(capfd)
    given = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NODELIST": "node[1-2]"}
    for name, value in (given | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[1-2]" ] && echo localhost\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    backends = []
    monkeypatch.setattr(Runner, "train", lambda runner: backends.append((dist.get_backend(), runner.model)))
    assert train(arguments) == 0
    [(backend, model)] = backends
    assert backend == "gloo"
    assert isinstance(model, nn.parallel.DistributedDataParallel)  # SyncBatchNorm and all
    assert not dist.is_initialized()


ON_NPU = """
import sys, torch
from segmentation.train import main
status = main(sys.argv[1:])
print("peak memory", torch.npu.max_memory_allocated())
sys.exit(status)
"""


@pytest.mark.slow
def test_it_trains_on_the_standin_npu(config: Path, tmp_path: Path) -> None:
    arguments = [str(config), "--work-dir", str(tmp_path / "npu"), "--device", "npu", "--amp", "bf16"]
    result = subprocess.run(
        [sys.executable, "-c", ON_NPU, *arguments],
        cwd=ROOT, env=standin_environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout.rpartition("peak memory ")[2]) > 0
    entries = logged(tmp_path / "npu")
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(np.log(3), abs=0.2)
    assert "mIoU" in entries[-1]
