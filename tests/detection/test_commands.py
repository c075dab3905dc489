"""`python -m detection.train`, `test`, `predict`, `info` and `export`, on a tiny Mask R-CNN and a tiny COCO."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from PIL import Image

from detection.export import main as export
from detection.info import main as info
from detection.predict import main as predict
from detection.test import main as evaluate
from detection.train import main as train
from hvt_backbones.cli import main as hvt
from hvt_backbones.exported import load_exported
from hvt_backbones.ops import use_attention
from runner.checkpoints import read_checkpoint
from tests.dense_runs import CLASSES, ROOT, error_line, logged, write_config, write_program
from tests.detection.conftest import settings

CPU = ("--device", "cpu")


def checkpoint(trained: Path) -> str:
    return str(trained / "epoch_1.pth")


@pytest.mark.slow
def test_training_learns_at_the_scaled_rate_and_saves(trained: Path) -> None:
    steps = [entry for entry in logged(trained) if "loss" in entry]
    assert steps[-1]["lr"] == pytest.approx(1e-3 * 2 / 16)
    assert {"loss_rpn_cls", "loss_bbox", "loss_mask"} <= steps[-1].keys()
    saved = read_checkpoint(checkpoint(trained))
    assert saved["meta"]["iter"] == 3
    assert {tensor.dtype for tensor in saved["state_dict"].values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.slow
def test_test_finds_what_the_evaluation_after_training_found(
    config: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert evaluate([str(config), checkpoint(trained), "--work-dir", str(tmp_path), *CPU]) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    expected = logged(trained)[-1]
    assert {"coco/bbox_mAP", "coco/segm_mAP_50"} <= report["metrics"].keys()
    for name, value in report["metrics"].items():
        assert value == pytest.approx(expected[name], abs=2e-3), name
    assert "coco/segm_mAP_50" in capfd.readouterr().out


MISFITS = {
    "regions": (
        "model.roi_head.mask_roi_extractor.out_channels=8",
        "model.roi_head.mask_roi_extractor.out_channels is 8, the neck gives maps of 16",
    ),
    "box head": (
        "model.roi_head.bbox_head.in_channels=32",
        "model.roi_head.bbox_head.in_channels is 32, model.roi_head.bbox_roi_extractor gives maps of 16",
    ),
    "mask head": ("model.roi_head.mask_head.in_channels=32", "model.roi_head.mask_head.in_channels is 32"),
    "size": ("model.roi_head.bbox_head.roi_feat_size=5", "roi_feat_size is (5, 5)"),
    "classes": (
        "model.roi_head.mask_head.num_classes=3",
        "model.roi_head.mask_head.num_classes is 3, the training data has 2 classes (disc, box): set it to 2",
    ),
    "classes of validation": (
        "val_dataloader.dataset.metainfo.classes=[box]",
        "model.roi_head.bbox_head.num_classes is 2, the validation data has the class box: set it to 1",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    option, expected = MISFITS[case]
    assert train([str(config), "--work-dir", str(tmp_path), *CPU, "--cfg-options", option]) == 2
    assert expected in error_line(capfd)


FITS = {
    "maps side by side": (
        "model.roi_head.bbox_roi_extractor.type=GenericRoIExtractor",
        "model.roi_head.bbox_roi_extractor.aggregation=concat",
        "model.roi_head.bbox_roi_extractor.out_channels=64",
        "model.roi_head.bbox_head.in_channels=64",
    ),
    "one mask for all classes": (
        "model.roi_head.mask_head.class_agnostic=True",
        "model.roi_head.mask_head.num_classes=1",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_parts_that_fit_are_taken(case: str, config: Path, tmp_path: Path) -> None:
    assert train([str(config), "--work-dir", str(tmp_path), *CPU, "--cfg-options", *FITS[case]]) == 0
    assert "coco/bbox_mAP" in logged(tmp_path)[-1]


def test_info_counts_by_part(config: Path, capsys: pytest.CaptureFixture) -> None:
    counts = []
    for attention in ("reference", "sdpa"):
        with use_attention(attention):
            assert info([str(config), "--shape", "64", "96", "--json", *CPU]) == 0
        counts.append(json.loads(capsys.readouterr().out)["parts"])
    parts = counts[0]
    assert counts == [parts] * 2
    assert list(parts) == ["backbone", "neck", "rpn_head", "roi_head", "total"]
    for figure in ("params", "flops"):
        assert parts["total"][figure] == sum(part[figure] for name, part in parts.items() if name != "total")
    maps = [(16 * 24, 8), (8 * 12, 16), (4 * 6, 32), (2 * 3, 64)]  # pixels and channels of each stage
    assert parts["neck"]["flops"] == sum(pixels * (channels * 16 + 16 * 16 * 9) for pixels, channels in maps)
    assert parts["neck"]["params"] == sum(channels * 16 + 16 + 16 * 16 * 9 + 16 for _, channels in maps)
    assert info([str(config), "--shape", "64", "96", *CPU]) == 0
    assert "roi_head" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["graph.onnx", "graph.pt2"])
def test_backbone_and_neck_are_exported_for_every_size(
    name: str, config: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mmdet.apis import init_detector

    file, form = tmp_path / name, "onnx" if name.endswith("onnx") else "torch-export"
    assert export([str(config), checkpoint(trained), "--format", form, "--output", str(file), *CPU]) == 0
    assert "checked against the model" in capsys.readouterr().out
    graph, detector = load_exported(file), init_detector(str(config), checkpoint(trained), device="cpu")
    assert graph.facts.outputs == ["level0", "level1", "level2", "level3"]
    assert graph.facts.strides == [4, 8, 16, 32]
    assert list(graph.facts.class_names) == list(CLASSES)
    assert graph.facts.preprocessing.mean == pytest.approx((110 / 255,) * 3)
    for batch, height, width in ((1, 75, 130), (3, 64, 33)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(graph(images), detector.extract_feat(images), rtol=1e-4, atol=1e-4)
    Image.new("RGB", (50, 50)).save(tmp_path / "picture.png")
    capsys.readouterr()
    assert hvt(["features", str(file), str(tmp_path / "picture.png"), "--output", str(tmp_path / "maps.npz")]) == 2
    assert "none of `hvt models`" in error_line(capsys)
    assert export([str(config), checkpoint(trained), "--format", form, "--output", str(tmp_path / "a.xml"), *CPU]) == 2
    assert "a file of" in error_line(capsys)


BAD = {
    "test": (evaluate, ("BAD",)),
    "predict": (predict, ("BAD", "PICTURES", "--out-dir", "OUT")),
    "resume": (train, ("--resume", "BAD")),
    "load_from": (train, ("--cfg-options", "load_from=BAD")),
    "init_cfg of the neck": (
        train, ("--cfg-options", "model.neck.init_cfg.type=Pretrained", "model.neck.init_cfg.checkpoint=BAD")
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_a_pickle_that_runs_a_program_is_refused(
    case: str, config: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    main, options = BAD[case]
    bad, proof = write_program(tmp_path)
    words = {"BAD": str(bad), "PICTURES": str(coco / "val2017"), "OUT": str(tmp_path / "out")}
    for word, meant in words.items():
        options = tuple(option.replace(word, meant) for option in options)
    work_dir = () if main is predict else ("--work-dir", str(tmp_path / "run"))
    assert main([str(config), *options, *work_dir, *CPU]) == 2
    message = error_line(capfd)
    assert str(bad) in message
    assert "can run any program" in message
    assert not proof.exists()
    torch.load(bad, weights_only=False)  # as MMEngine would in the end
    assert proof.exists()


@pytest.mark.slow
def test_weights_of_another_model_are_no_test(
    config: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    saved = read_checkpoint(checkpoint(trained))
    del saved["state_dict"]["neck.fpn_convs.0.conv.weight"]
    torch.save(saved, tmp_path / "short.pth")
    assert evaluate([str(config), str(tmp_path / "short.pth"), "--work-dir", str(tmp_path), *CPU]) == 2
    assert "neck.fpn_convs.0.conv.weight" in error_line(capfd)
    assert not (tmp_path / "metrics.json").exists()


OPTIONS = {
    "no form": (["--cfg-options", "novalue"], "'novalue' is not KEY=VALUE"),
    "brackets": (["--cfg-options", "model.neck.num_outs=[(1,2]"], "is not KEY=VALUE"),
    "top": (["--cfg-options", "launchr=none"], "launchr: unknown key; did you mean launcher"),
    "above": (["--cfg-options", "model.backbon.name=x"], "the config has no model.backbon; did you mean backbone?"),
    "beside a class": (["--cfg-options", "model.necklace.depth=1"], "MaskRCNN: TypeError: "),
    "plain": (["--cfg-options", "model.test_cfg.rcnn.score_thrs=0.1"], "did you mean model.test_cfg.rcnn.score_thr?"),
    "class": (["--cfg-options", "model.backbone.drop_path=0.1"], "did you mean drop_path_rate"),
    "type": (["--cfg-options", "model.neck.type=FPNN"], "FPNN is not in the mmdet::model registry"),
    "index": (["--cfg-options", "train_dataloader.dataset.pipeline.9=x"], "is a list of 4"),
    "option": (["--worksdir", "x"], "unrecognized arguments: --worksdir"),
    "device": (["--device", "tpu"], "invalid choice: 'tpu'"),
    "fp16": (["--amp", "fp16"], "--amp fp16 needs an accelerator"),
    "launcher": (["--launcher", "pytorch"], "the environment lacks RANK, LOCAL_RANK"),
    "resume": (["--resume", "none.pth"], "none.pth does not exist"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_named_in_one_line(
    case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options, expected = OPTIONS[case]
    device = () if case == "device" else CPU
    assert train([str(config), "--work-dir", str(tmp_path), *device, *options]) == 2
    assert expected in error_line(capfd)


def test_a_folder_that_cannot_be_written_is_named(
    config: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert train([str(config), "--work-dir", str(file), *CPU]) == 2
    assert f"--work-dir {file} is no folder" in error_line(capfd)
    assert train([str(config), "--work-dir", str(file / "run"), *CPU]) == 2
    assert "--work-dir" in error_line(capfd)


@pytest.mark.slow
def test_weights_alone_are_nothing_to_resume(
    config: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    weights = read_checkpoint(checkpoint(trained))["state_dict"]
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    arguments = [str(config), "--work-dir", str(tmp_path / "run"), *CPU, "--resume", str(tmp_path / "weights.pth")]
    assert train(arguments) == 2
    assert "is no checkpoint of this run (KeyError: meta)" in error_line(capfd)
    del weights["neck.fpn_convs.0.conv.weight"]
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    assert train(arguments) == 2
    assert "neck.fpn_convs.0.conv.weight" in error_line(capfd)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(
    workers: int, config: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = shutil.copytree(coco, tmp_path / "coco")
    broken = root / "train2017" / "000000000002.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    options = (f"train_dataloader.dataset.data_root={root}", f"train_dataloader.num_workers={workers}")
    assert train([str(config), "--work-dir", str(tmp_path / "run"), *CPU, "--cfg-options", *options]) == 2
    assert error_line(capfd).startswith(f"error: {broken} cannot be loaded (AssertionError: failed to load image")


def test_annotations_of_other_classes_are_refused(
    config: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = [str(config), "--work-dir", str(tmp_path / "run"), *CPU, "--cfg-options"]
    assert train([*arguments, "train_dataloader.dataset.metainfo.classes=('disc','ball')"]) == 2
    assert "instances_train2017.json has 1 of the 2 classes disc, ball" in error_line(capfd)
    assert train([*arguments, "train_dataloader.dataset.filter_cfg.min_size=999"]) == 2
    assert "instances_train2017.json holds no sample" in error_line(capfd)


def test_a_wrong_config_is_named_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert train(["mask-rcnn_swn-t-p4-w7_fpn_1x_coco.py", *CPU]) == 2
    assert "'swn-t-p4-w7' in configurations; did you mean swin-t-p4-w7" in error_line(capfd)
    broken = tmp_path / "broken.py"
    for text, expected in {
        "model = dict(": "SyntaxError", "_base_ = './gone.py'": "gone.py", "model = dict(a=1 / 0)": "ZeroDivisionError",
        "lr = 1": "has no model", "default_scope = 'mmseg'\nmodel = {}": "detection runs mmdet",
    }.items():  # fmt: skip
        broken.write_text(text)
        assert train([str(broken), *CPU]) == 2
        message = error_line(capfd)
        assert expected in message
        assert str(broken) in message


DATA = {
    "root": ("data_root=gone/coco", ["file gone/coco/annotations/instances_train2017.json does not exist"]),
    "annotations": ("ann_file=annotations/x.json", ["x.json does not exist", "instances_train2017.json"]),
    "folder": ("data_prefix.img=train2014", ["train2014 does not exist", "holds annotations, empty, train2017"]),
    "empty": ("data_prefix.img=empty", ["empty is empty"]),
    "file": ("data_prefix.img=annotations/instances_val2017.json", ["is a file, not a folder"]),
}


@pytest.mark.parametrize("case", DATA)
def test_missing_data_is_named_with_what_is_there(
    case: str, config: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (coco / "empty").mkdir(exist_ok=True)
    option, expected = DATA[case]
    arguments = [
        str(config),
        "--cfg-options",
        f"train_dataloader.dataset.{option}",
        "--work-dir",
        str(tmp_path / "run"),
    ]
    assert train([*arguments, *CPU]) == 2
    message = error_line(capfd)
    assert all(text in message for text in ["train data", "annotations/instances_{train,val}2017.json", *expected])
    assert not (tmp_path / "run").exists()


def test_data_that_is_repeated_or_for_the_evaluator_is_checked_too(
    coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    changed = settings(str(coco))
    dataset = changed["train_dataloader"]["dataset"] | {"ann_file": "annotations/gone.json"}
    changed["train_dataloader"]["dataset"] = {"type": "RepeatDataset", "times": 2, "dataset": dataset}
    path = write_config(tmp_path / "repeated.py", changed)
    assert train([str(path), *CPU]) == 2
    assert "gone.json does not exist" in error_line(capfd)
    changed = settings(str(coco))
    changed["val_evaluator"] = changed["val_evaluator"] | {"ann_file": str(tmp_path / "gone.json")}
    path = write_config(tmp_path / "evaluated.py", changed)
    assert train([str(path), *CPU]) == 2
    assert "val_evaluator" in error_line(capfd)


def test_ctrl_c_is_130(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(runner: Runner) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "from_cfg", interrupted)
    assert train([str(config), "--work-dir", str(tmp_path), *CPU]) == 130


def test_without_openmmlab_a_line_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['mmengine'] = None; from detection.train import main; sys.exit(main(['x']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: the package mmengine is not installed: `make install-all` installs it\n"
