"""`python -m video.train`, `test`, `predict`, `info`, `check`, `export`: a tiny recognizer, a tiny Kinetics."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from PIL import Image

from hvt_backbones.exported import load_exported
from runner.checkpoints import read_checkpoint
from tests.dense_runs import ROOT, error_line, in_two_processes, logged, torchrun
from tests.video.conftest import CLASSES, FRAMES, damaged, write_clip, write_list, write_sound
from video.export import main as export
from video.info import main as info
from video.predict import main as predict
from video.test import main as evaluate
from video.train import main as train

CPU = ("--device", "cpu")
COMMAND = (sys.executable, "-m", "video.train")


def checkpoint(trained: Path) -> str:
    return str(trained / "epoch_2.pth")


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def log_text(work_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(work_dir.glob("*/*.log")))


def at(root: Path, *parts: str, **others: Any) -> list[str]:
    """--cfg-options for the data of these parts below `root`, with further settings of the data sets."""
    options = []
    for part in parts:
        split, where = "train" if part == "train" else "val", f"{part}_dataloader.dataset"
        options += [f"{where}.ann_file={root}/{split}.txt", f"{where}.data_prefix.video={root}/videos_{split}"]
        options += [f"{where}.{key}={value}" for key, value in others.items()]
    return ["--cfg-options", *options]


@pytest.mark.slow
def test_test_finds_what_the_evaluation_after_training_found(
    config: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert evaluate([str(config), checkpoint(trained), "--work-dir", str(tmp_path), *CPU]) == 0
    expected = logged(trained)[-1]
    found = metrics(tmp_path)
    assert found.keys() == {"acc/top1", "acc/top2", "acc/mean1"}
    assert found == {name: pytest.approx(expected[name], abs=1e-6) for name in found}
    assert "acc/mean1" in capfd.readouterr().out


@pytest.mark.slow
def test_losses_that_are_no_numbers_end_a_run_and_name_the_clips(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    parse = BaseModel.parse_losses
    monkeypatch.setattr(BaseModel, "parse_losses", lambda *args: (parse(*args)[0] * float("nan"), {}))
    assert train([str(config), "--work-dir", str(tmp_path), *CPU, "--max-bad-steps", "2"]) == 1
    line = error_line(capfd)
    assert "training diverged at step 2 " in line
    names = (tmp_path / "bad_batch.txt").read_text().splitlines()
    assert names
    assert all(Path(name).is_file() and name in line for name in names)


@pytest.mark.slow
def test_predict_names_classes_and_draws(
    config: Path, trained: Path, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    labels = write_list(tmp_path / "labels.txt", ["playing the flute", "jumping", "eating"])
    arguments = [str(config), checkpoint(trained), str(kinetics / "videos_val"), *CPU, "--labels", str(labels)]
    assert predict([*arguments, "--out-dir", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [result["file_name"] for result in results] == ["000.mp4", "003.mp4", "001.mp4", "004.mp4", "002.mp4"]
    evaluate([str(config), checkpoint(trained), "--work-dir", str(tmp_path / "test"), *CPU])
    truth = [int(Path(result["path"]).parent.name.split()[1]) for result in results]
    right = [result["top"][0]["label"] == label for result, label in zip(results, truth, strict=True)]
    assert sum(right) / 5 == pytest.approx(metrics(tmp_path / "test")["acc/top1"])
    for result in results:
        scores = [one["score"] for one in result["top"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-4)
        assert {one["class"] for one in result["top"]} == set(labels.read_text().splitlines())
        assert f"{scores[0]:6.1%}  {result['top'][0]['class']}" in printed
    strip = Image.open(tmp_path / "out" / "strips" / "class 1" / "001.jpg")
    assert strip.size == (8 * 160, 160 + 18 * CLASSES + 8)
    pixels = np.asarray(strip, dtype=int)
    corner = [pixels[4, 160 * index + 155].mean() for index in range(8)]  # the background, brighter with each frame
    assert all(later > sooner + 5 for sooner, later in itertools.pairwise(corner))
    assert pixels[164:].max() > 200


@pytest.mark.slow
def test_predict_moves_numbers_classes_and_names_what_is_broken(
    config: Path, trained: Path, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    clip = write_clip(tmp_path / "a clip.webm", codec="libvpx")
    out = ["--out-dir", str(tmp_path / "out"), *CPU]
    assert predict([str(config), checkpoint(trained), str(clip), "--gif", *out]) == 0
    moving = Image.open(tmp_path / "out" / "strips" / "a clip.gif")
    assert moving.n_frames == FRAMES
    assert moving.info["duration"] == 100  # ms, at 10 frames per second
    (result,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {one["class"] for one in result["top"]} == {"0", "1", "2"}
    sound = write_sound(tmp_path / "sound.mp4")
    assert predict([str(config), checkpoint(trained), str(sound), *out, "--on-error", "fail"]) == 2
    assert f"clip {sound} has no video stream (it holds audio)" in error_line(capfd)
    labels = write_list(tmp_path / "labels.txt", ["one", "two"])
    assert predict([str(config), checkpoint(trained), str(clip), "--labels", str(labels), *out]) == 2
    assert "labels.txt names 2 classes, the model has 3" in error_line(capfd)
    for name, message in {"gone.txt": "does not exist", "empty.txt": "is empty"}.items():
        (tmp_path / "empty.txt").touch()
        assert predict([str(config), "none.pth", str(clip), "--labels", str(tmp_path / name), *out]) == 2
        assert message in error_line(capfd)
    assert predict([str(config), "none.pth", str(tmp_path / "gone.mp4"), *out]) == 2
    assert "gone.mp4 does not exist" in error_line(capfd)


@pytest.mark.slow
def test_predict_leaves_out_what_it_may(
    config: Path, trained: Path, kinetics: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    clips = [str(kinetics / "videos_val" / "class 0" / "000.mp4"), str(empty)]
    command = [str(config), str(trained / "epoch_2.pth"), *clips, "--out-dir", str(tmp_path / "out"), *CPU]
    assert predict(command) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "1 of 2 files were left out"
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["file_name"] for one in results] == ["000.mp4"]


@pytest.mark.slow
def test_views_are_limited_in_batches_of_one_alone(config: Path, trained: Path, tmp_path: Path) -> None:
    for batch_size in (1, 2):
        folder = tmp_path / str(batch_size)
        options = ["model.test_cfg.max_testing_views=2", f"test_dataloader.batch_size={batch_size}"]
        with_views = tmp_path / "views.py"
        with_views.write_text(f"_base_ = {str(config)!r}\nmodel = dict(test_cfg=dict())\n")
        command = [str(with_views), str(trained / "epoch_2.pth"), "--work-dir", str(folder), *CPU]
        assert evaluate([*command, "--cfg-options", *options, "val_dataloader.batch_size=1"]) == 0
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("1", "2"))
    assert one == two


def test_info_counts_by_part(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert info([str(config), "--shape", "4", "32", "32", "--json", *CPU]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["shape"] == [4, 32, 32]
    parts = report["parts"]
    assert list(parts) == ["backbone", "cls_head", "total"]
    assert parts["cls_head"] == {"params": 64 * CLASSES + CLASSES, "flops": 64 * CLASSES}
    for figure in ("params", "flops"):
        assert parts["total"][figure] == parts["backbone"][figure] + parts["cls_head"][figure]
    assert info([str(config), "--shape", "4", "64", "64", "--json", *CPU]) == 0
    larger = json.loads(capsys.readouterr().out)["parts"]["backbone"]
    assert larger["params"] == parts["backbone"]["params"]
    assert larger["flops"] > 3 * parts["backbone"]["flops"]
    assert info([str(config), "--shape", "4", "32", "32", *CPU]) == 0
    assert "input 4 x 32 x 32" in capsys.readouterr().out


@pytest.mark.slow
def test_a_recognizer_is_exported_for_clips_of_every_size(config: Path, trained: Path, tmp_path: Path) -> None:
    from mmaction.apis import init_recognizer

    file = tmp_path / "graph.onnx"
    assert export([str(config), checkpoint(trained), "--format", "onnx", "--output", str(file), *CPU]) == 0
    graph, recognizer = load_exported(file), init_recognizer(str(config), checkpoint(trained), "cpu")
    for frames, height, width in ((8, 64, 64), (5, 41, 70)):
        clips = torch.randn(2, 3, frames, height, width)
        with torch.no_grad():
            expected = recognizer.cls_head(recognizer.extract_feat(clips[:, None])[0])
        torch.testing.assert_close(graph(clips), expected, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "data": (
        ["--cfg-options", "train_dataloader.dataset.on_error=ignore"],
        "on_error is 'ignore': choose fail or skip",
    ),
    "decoder": (["--cfg-options", "train_dataloader.dataset.decoder=cv2"], "decoder is 'cv2': choose one of"),
    "classes": (["--cfg-options", "model.cls_head.num_classes=2"], "the label 2 of class 2/002.mp4 is not below 2"),
    "no frames": (["--cfg-options", "val_dataloader.dataset.pipeline.1.clip_len=0"], "clip_len of SampleFrames is 0"),
    "option": (["--tta"], "unrecognized arguments: --tta"),
    "list": (["--cfg-options", "train_dataloader.dataset.ann_file=gone.txt"], "gone.txt does not exist"),
    "folder": (["--cfg-options", "val_dataloader.dataset.data_prefix.video=gone"], "videos_train/ and videos_val/"),
    "head": (
        ["--cfg-options", "model.cls_head.in_channels=768"],
        "model.cls_head.in_channels is 768, the backbone video_swin_tiny gives maps of 64 channels",
    ),
    "stages": (["--cfg-options", "model.backbone.out_indices=[2,3]"], "gives maps of 32, 64 channels"),
    "foreign": (["--cfg-options", "load_from=FOREIGN"], "has no key of the config's model, so nothing was loaded"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_wrong_option_is_named_in_one_line(
    case: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    options, expected = OPTIONS[case]
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {"someone.elses.weight": torch.zeros(2)}}, foreign)
    options = [option.replace("FOREIGN", str(foreign)) for option in options]
    assert train([str(config), "--work-dir", str(tmp_path), *CPU, *options]) == 2
    assert expected in error_line(capfd)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_read_ends_the_run_with_its_name(
    workers: int, config: Path, trained: Path, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    name = "videos_train/class 1/004.mp4"
    root = damaged(kinetics, tmp_path, name, "videos_val/class 2/002.mp4")
    work_dir = ("--work-dir", str(tmp_path / "run"), *CPU)
    arguments = [*at(root, "train"), f"train_dataloader.num_workers={workers}"]
    assert train([str(config), *work_dir, *arguments]) == 2
    message = error_line(capfd)
    assert message.startswith(f"error: clip {root / name} is empty (0 bytes): replace it")
    arguments = [*at(root, "test"), f"test_dataloader.num_workers={workers}"]
    assert evaluate([str(config), checkpoint(trained), *work_dir, *arguments]) == 2
    assert f"{root}/videos_val/class 2/002.mp4 is empty (0 bytes)" in error_line(capfd)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_goes_on_and_says_so(
    workers: int, config: Path, trained: Path, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = damaged(kinetics, tmp_path, "videos_train/class 1/004.mp4", "videos_val/class 2/002.mp4")
    lenient = at(root, "train", "val", on_error="skip", max_errors=0.2)
    workers_option = f"train_dataloader.num_workers={workers}"
    assert train([str(config), "--work-dir", str(tmp_path / "run"), *CPU, *lenient, workers_option]) == 0
    text = log_text(tmp_path / "run")
    said = f"train data: 1 of 6 clips cannot be read, others took their place: {root}/videos_train/class 1/004.mp4"
    assert text.count(said) == 2
    said = (
        f"val data: 1 of 5 clips cannot be read, they are left out of the accuracy: {root}/videos_val/class 2/002.mp4"
    )
    assert text.count(said) == 2
    steps = [entry for entry in logged(tmp_path / "run") if "acc/top1" in entry]
    assert [(entry["acc/clips"], entry["acc/left_out"]) for entry in steps] == [(4, 1), (4, 1)]
    saved = read_checkpoint(tmp_path / "run" / "epoch_1.pth")
    assert saved["message_hub"]["runtime_info"]["unreadable_clips"] == [f"{root}/videos_train/class 1/004.mp4"]

    # as without this clip in the list
    good = [line for line in (root / "val.txt").read_text().splitlines() if "002" not in line]
    write_list(root / "good.txt", good)
    found = []
    for options in ([*at(root, "test", on_error="skip", max_errors=0.2), f"test_dataloader.num_workers={workers}"],
                    [*at(root, "test"), f"test_dataloader.dataset.ann_file={root}/good.txt"]):  # fmt: skip
        assert evaluate([str(config), checkpoint(trained), "--work-dir", str(tmp_path / "t"), *CPU, *options]) == 0
        found.append(metrics(tmp_path / "t"))
    assert found[0] == {**found[1], "acc/clips": 4, "acc/left_out": 1}

    capfd.readouterr()
    strict = at(root, "train", "val", on_error="skip", max_errors=0)
    assert train([str(config), "--work-dir", str(tmp_path / "strict"), *CPU, *strict, workers_option]) == 2
    assert "1 of 6 clips cannot be read, max_errors of the data set allows 0; the last is" in error_line(capfd)


@pytest.mark.slow
def test_several_broken_clips_are_counted_once_each(
    config: Path, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Each by itself is within the share; both together are not."""
    root = damaged(kinetics, tmp_path, "videos_train/class 1/004.mp4", "videos_train/class 2/002.mp4")
    arguments = [str(config), *CPU, *at(root, "train", on_error="skip", max_errors=0.2)]
    assert train([*arguments, "--work-dir", str(tmp_path / "run")]) == 2
    assert "2 of 6 clips cannot be read, max_errors of the data set allows 1; the last is" in error_line(capfd)


@pytest.mark.slow
def test_two_processes_train_resume_and_test(config: Path, kinetics: Path, tmp_path: Path) -> None:
    root = damaged(kinetics, tmp_path, "videos_val/class 0/000.mp4")
    options = at(root, "train", "val", "test", on_error="skip", max_errors=0.2)
    result = torchrun("video.train", [str(config), "--work-dir", str(tmp_path / "run"), *options])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "GPU number: 2" in result.stdout + result.stderr  # MMEngine's word for processes
    assert [entry["step"] for entry in logged(tmp_path / "run") if "loss" in entry] == [2, 4]
    together = logged(tmp_path / "run")[-1]
    assert (together["acc/clips"], together["acc/left_out"]) == (4, 1)
    saved = str(tmp_path / "run" / "epoch_2.pth")
    assert evaluate([str(config), saved, "--work-dir", str(tmp_path / "alone"), *CPU, *options]) == 0
    assert metrics(tmp_path / "alone") == {
        name: pytest.approx(together[name], abs=1e-6) for name in metrics(tmp_path / "alone")
    }
    for arguments, main in ((["--resume", str(tmp_path / "run" / "epoch_1.pth")], "train"), ([saved], "test")):
        folder = tmp_path / main
        command = [str(config), *arguments, "--work-dir", str(folder), *CPU, "--launcher", "pytorch", *options]
        assert in_two_processes(f"video.{main}:main", command) == [0, 0]
        if main == "test":
            assert metrics(folder) == metrics(tmp_path / "alone")
        else:
            assert [entry["step"] for entry in logged(folder) if "loss" in entry] == [4]


@pytest.mark.slow
def test_workers_that_are_started_afresh(config: Path, tmp_path: Path) -> None:
    options = ["env_cfg.mp_cfg.mp_start_method=spawn", "train_cfg.max_epochs=1"]
    options += [f"{part}_dataloader.num_workers=1" for part in ("train", "val")]
    result = subprocess.run(
        [*COMMAND, str(config), "--work-dir", str(tmp_path), *CPU, "--cfg-options", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert "acc/top1" in logged(tmp_path)[-1]
