"""Names of configurations: a grammar, bases of a user's own files, and what `detection.config` prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
from mmengine.config import Config

from detection.config import main
from detection.zoo import DETECTION
from hvt_backbones.errors import InputError
from runner.application import image_backbones
from runner.config import open_config
from runner.parts import complete
from segmentation.zoo import SEGMENTATION
from tests import dense_configs as shared
from tests.dense_runs import CLASSES, ROOT
from video.zoo import VIDEO

SWIN_T = "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"


def test_a_combination_that_is_no_row_has_the_settings_of_its_neighbours() -> None:
    cfg = open_config("cascade-mask-rcnn_swinv2-b-w16_fpn_ms-crop-3x_coco", {}, DETECTION)
    backbone = cfg.model.backbone
    assert (backbone.name, backbone.pretrained, backbone.drop_path_rate) == ("swinv2_base_window16", "in1k", 0.3)
    assert cfg.model.neck.in_channels == [128, 256, 512, 1024]
    assert cfg.train_cfg.max_epochs == 36
    assert cfg.filename == "cascade-mask-rcnn_swinv2-b-w16_fpn_ms-crop-3x_coco.py"
    cfg = open_config("retinanet_pvtv2-b4_fpn_ms-crop-3x_coco", {}, DETECTION)
    assert cfg.val_evaluator.metric == "bbox"
    assert not any("with_mask" in step for step in cfg.train_dataloader.dataset.pipeline)


@pytest.mark.parametrize("token", image_backbones())
def test_every_image_model_has_a_name(token: str) -> None:
    weights = "-in22k" if "in22k" in image_backbones()[token].tags else ""
    cfg = open_config(f"mask-rcnn_{token}_fpn_1x_coco", {}, DETECTION)
    assert cfg.model.backbone.name == image_backbones()[token].name
    cfg = SEGMENTATION.config(f"fpn_{token}{weights}_8xb2-160k_ade20k-640x640")
    assert cfg.model.backbone.pretrained in image_backbones()[token].tags
    assert cfg.model.test_cfg.crop_size == (640, 640)


def test_channels_are_completed_beside_a_key_of_weights() -> None:
    options = {"model.backbone.pretrained": "weights.pth", "model.backbone.weights_key": "ema"}
    model = open_config(SWIN_T, options, DETECTION).model
    assert (model.neck.in_channels, model.backbone.weights_key) == ([96, 192, 384, 768], "ema")


def test_video_has_other_combinations_too() -> None:
    cfg = VIDEO.config("swin-small-p244-w877_in22k-pre_8xb8-32x2x1-30e_kinetics600-rgb")
    assert (cfg.model.backbone.pretrained, cfg.model.cls_head.num_classes) == ("swin_small.in22k", 600)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask-rcnn_swin-t-p4-w7_fpn_2x_coco", f"no name of a configuration; did you mean {SWIN_T}"),
        ("mask-rcnn_swinv3-t-w8_fpn_1x_coco", "no backbone is called 'swinv3-t-w8' .* did you mean swinv2-t-w8"),
        ("mask-rcnn_pvtv2-b2-in22k_fpn_1x_coco", "pvt_v2_b2 has no weights in22k; it has in1k"),
        ("folder/nothing.py", "folder/nothing.py does not exist"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_config(name, {}, DETECTION)


@pytest.mark.parametrize("base", [SWIN_T, f"{SWIN_T}.py", f"../detection/configs/swin/{SWIN_T}.py"])
def test_a_file_may_name_one_as_its_base(base: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"_base_ = [{base!r}]\nmodel = dict(backbone=dict(name='pvt_v2_b0'))\nseed = 3\n")
    cfg = open_config(str(file), {"train_cfg.max_epochs": 1}, DETECTION)
    assert cfg.model.backbone.name == "pvt_v2_b0"
    assert cfg.model.neck.in_channels == [32, 64, 160, 256]
    assert (cfg.seed, cfg.train_cfg.max_epochs, Path(cfg.filename)) == (3, 1, file)
    with pytest.raises(FileNotFoundError):  # elsewhere MMEngine's rules hold
        Config.fromfile(file)


def test_classes_are_those_of_the_data(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        f"_base_ = ['{SWIN_T}']\nmeta = dict(classes=('a', 'b'))\n"
        "train_dataloader = dict(dataset=dict(metainfo=meta))\nmodel = dict(neck=dict(out_channels=64))\n"
    )
    cfg = open_config(str(file), {}, DETECTION)
    heads = cfg.model.roi_head
    assert (heads.bbox_head.num_classes, heads.mask_head.num_classes) == (2, 2)
    assert (cfg.model.rpn_head.in_channels, heads.bbox_head.in_channels, heads.mask_head.in_channels) == (64, 64, 64)
    assert heads.bbox_roi_extractor.out_channels == 64


def test_config_prints_one_whole_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([SWIN_T, "--cfg-options", "train_dataloader.batch_size=1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Swin-T as mmdetection trains it at one scale;")
    file = tmp_path / "whole.py"
    file.write_text(text)
    expected = open_config(SWIN_T, {"train_dataloader.batch_size": 1}, DETECTION)
    assert Config.fromfile(file).to_dict() == expected.to_dict()
    assert main(["--tables"]) == 0
    assert "### RetinaNet, 1x" in capsys.readouterr().out
    assert main([]) == 2
    assert "CONFIG is missing" in capsys.readouterr().err


def test_a_map_that_is_not_there_is_named() -> None:
    options = {"model.decode_head.in_index": [0, 1, 2, 5]}
    with pytest.raises(InputError, match=r"decode_head.in_index is \[0, 1, 2, 5\], the neck gives 4 maps, 0 to 3"):
        open_config("fpn_swin-t-p4-w7_8xb2-80k_ade20k-512x512", options, SEGMENTATION)


@pytest.mark.slow
def test_the_frameworks_own_tools_run_it(coco: Path, tmp_path: Path) -> None:
    cfg = shared.small_config(SWIN_T, DETECTION, shared.WINDOWED, tmp_path / "run")
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.update(data_root=f"{coco}/", metainfo={"classes": CLASSES})
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(coco / "annotations" / "instances_val2017.json")
    cfg.default_hooks.checkpoint = {"type": "CheckpointHook", "interval": 1}
    cfg.train_cfg.update(max_epochs=1)
    complete(cfg)
    file = tmp_path / "whole.py"
    file.write_text(cfg.pretty_text)
    tools = Path(mmdet.__file__).parent / ".mim" / "tools"
    for command in (["train.py", str(file)], ["test.py", str(file), str(tmp_path / "run" / "epoch_1.pth")]):
        done = subprocess.run(
            [sys.executable, str(tools / command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "coco/bbox_mAP" in done.stdout + done.stderr
