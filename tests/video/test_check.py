"""`python -m video.check` finds what is wrong with a list and its clips."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.dense_runs import error_line
from tests.video.conftest import damaged, write_clip, write_list, write_sound
from video import check as checking
from video.check import main as check


@pytest.fixture
def flawed(kinetics: Path, tmp_path: Path) -> Path:
    """A list of 9 lines, three of them good, beside the folder `videos_train`."""
    root = damaged(kinetics, tmp_path, "videos_train/class 0/000.mp4")
    write_sound(root / "videos_train" / "class 1" / "001.mp4")
    write_clip(root / "videos_train" / "short.mp4", 5)
    lines = (root / "train.txt").read_text().splitlines()
    write_list(root / "train.txt", [*lines, "gone.mp4 1", "short.mp4 1", "class 2/005.mp4 two"])
    return root


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_check_finds_and_leaves_out_what_is_bad(
    decoder: str, workers: str, flawed: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = [str(flawed / "train.txt"), "--root", str(flawed / "videos_train"), "--decoder", decoder]
    arguments += ["--min-frames", "8", "--classes", "4", "--workers", workers]
    assert check([*arguments, "--json", str(tmp_path / "r.json"), "--write-clean", str(tmp_path / "c.txt")]) == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["clips"], report["good"], report["class_counts"]) == (9, 4, [1, 1, 2, 0])
    assert [one["line"] for one in report["unreadable"]] == [1, 2]
    assert report["unreadable"][0]["reason"] == "is empty (0 bytes)"
    assert report["unreadable"][1]["reason"] == "has no video stream (it holds audio)"
    assert [(one["line"], one["path"]) for one in report["missing"]] == [(7, "gone.mp4")]
    assert [(one["line"], one["reason"]) for one in report["too_short"]] == [(8, "has 5 frames of at least 8")]
    assert "train.txt line 9: the label 'two'" in report["wrong_lines"][0]
    shown = capfd.readouterr()
    assert "4 classes; good clips of each: 0 (class 3) to 2 (class 2), median 1" in shown.out
    assert "1 classes without a good clip: 3" in shown.out
    assert "line 2: class 1/001.mp4 has no video stream" in shown.out
    assert "7/7" in shown.err  # of the progress bar
    good = ["class 2/002.mp4 2", "class 0/003.mp4 0", "class 1/004.mp4 1", "class 2/005.mp4 2"]
    assert (tmp_path / "c.txt").read_text().splitlines() == good
    clean = [str(tmp_path / "c.txt"), "--root", str(flawed / "videos_train"), "--quick", "--workers", workers]
    assert check(clean) == 0
    assert "4 clips, 4 good" in capfd.readouterr().out


def test_a_clip_that_ends_its_process_does_not_end_the_check(
    kinetics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders are C libraries."""
    sources = sorted((kinetics / "videos_train").rglob("*.mp4")) * 8
    for index, source in enumerate(sources):
        shutil.copy(source, tmp_path / f"{index}.mp4")
    write_list(tmp_path / "list.txt", [f"{index}.mp4 0" for index in range(len(sources))])
    probe = checking.probe

    def crash(path: str, decoder: str, *, quick: bool) -> int:
        return os._exit(3) if Path(path).stem in ("5", "30") else probe(path, decoder, quick=quick)

    monkeypatch.setattr(checking, "probe", crash)
    report, good = checking.check(tmp_path / "list.txt", tmp_path, decoder="pyav", quick=True, workers=2)
    assert [(one["path"], one["reason"]) for one in report["unreadable"]] == [
        (name, "ends pyav, and the process with it") for name in ("5.mp4", "30.mp4")
    ]
    assert len(good) == len(sources) - 2


CHECKS = {
    "gone": (["gone.txt"], "gone.txt"),
    "root": (["LIST", "--root", "gone"], "--root gone is no folder"),
    "itself": (["LIST", "--write-clean", "LIST"], "is the list itself: name another file"),
    "workers": (["LIST", "--workers", "many"], "'many' is not a whole number"),
    "frames": (["LIST", "--min-frames", "0"], "'0' is not a whole number from 1"),
    "nothing good": (
        ["LIST", "--root", "ROOT", "--min-frames", "99", "--write-clean", "OUT"],
        "none of the clips is good",
    ),
}


@pytest.mark.parametrize("case", CHECKS)
def test_wrong_arguments_of_check(case: str, kinetics: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arguments, expected = CHECKS[case]
    words = {"LIST": kinetics / "val.txt", "ROOT": kinetics / "videos_val", "OUT": tmp_path / "clean.txt"}
    assert check([str(words.get(word, word)) for word in arguments]) == 2
    assert expected in error_line(capfd)
    assert not (tmp_path / "clean.txt").exists()
