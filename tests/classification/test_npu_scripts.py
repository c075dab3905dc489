"""The shell scripts for Ascend NPUs start the commands that their usage says, and the README's commands are real."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from classification.command_line import parse_command_line

from ..conftest import ROOT

FOLDER = ROOT / "classification" / "npu"
README = (FOLDER / "README.md").read_text()
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh") if path.name != "environment.sh")
ONE = ["python", "-m"]
EIGHT = ["torchrun", "--nproc_per_node", "8", "-m"]
# script: what it starts for DATA_DIR "pictures", without a recipe
STARTS = {
    "train_performance_1p.sh": [*ONE, "classification.train", "swin_tiny", "--benchmark-steps", "100"],
    "train_performance_8p.sh": [*EIGHT, "classification.train", "swin_tiny", "--benchmark-steps", "100"],
    "train_full_8p.sh": [*EIGHT, "classification.train", "swin_tiny"],
    "finetune_1p.sh": [*ONE, "classification.train", "finetune"],
    "finetune_8p.sh": [*EIGHT, "classification.train", "finetune"],
    "eval.sh": [*ONE, "classification.validate", "swin_tiny"],
}


class Shell:
    """A folder to run scripts in, where `python` and `torchrun` only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("bash", "cat", "dirname"):
            (folder / "bin" / name).symlink_to(shutil.which(name))
        for name in ("python", "torchrun"):
            stub = folder / "bin" / name
            stub.write_text(
                f'#!{shutil.which("bash")}\nprintf "%s\\0" {name} "$@" > {folder}/called\n'
                f'printf "%s\\n" "${{CANN-none}}" "$HCCL_CONNECT_TIMEOUT" "$PYTHONPATH" > {folder}/saw\nexit 7\n'
            )
            stub.chmod(0o755)
        cann = folder / "Ascend" / "ascend-toolkit" / "set_env.sh"
        cann.parent.mkdir(parents=True)
        # as CANN's own: with variables that are not set, a failing command, a look at the arguments
        cann.write_text('export CANN="set up $NOT_SET$1"\nfalse\n')

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{self.folder}/bin", "HOME": str(self.folder), "ASCEND_HOME": f"{self.folder}/Ascend"}
        command = [FOLDER / script, *words]
        return subprocess.run(
            command, env=environment | variables, cwd=self.folder, capture_output=True, text=True, timeout=600
        )

    def called(self) -> list[str]:
        words = (self.folder / "called").read_text().split("\0")[:-1]
        (self.folder / "called").unlink()
        return words


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def check_arguments(words: list[str], data: Path) -> None:
    """What the trainer or the validation would read, with `data` for the folder of pictures, without running it."""
    for split in ("train", "val"):
        (data / split / "a").mkdir(parents=True, exist_ok=True)
    words = [str(data) if before == "--data-dir" else word for before, word in pairwise(["", *words])]
    start = words.index("-m") + 1
    if words[start] == "classification.validate":
        from classification.validate import build_parser

        assert build_parser().parse_args(words[start + 1 :]).device == "npu"
    else:
        assert words[start] == "classification.train"
        assert parse_command_line(words[start + 1 :]).train.device == "npu"


def test_every_script_is_tested() -> None:
    assert set(SCRIPTS) == set(STARTS)
    for script in SCRIPTS:
        assert os.access(FOLDER / script, os.X_OK), script
        assert f"`{script}`" in README, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts_the_trainer(script: str, shell: Shell) -> None:
    launcher, rest = STARTS[script][:-1], STARTS[script][-1:]
    if "--benchmark-steps" in launcher:
        launcher, rest = STARTS[script][:-3], STARTS[script][-3:]
    recipe, *fixed = rest

    assert shell.run(script, "my pictures").returncode == 7  # the trainer's own status
    words = shell.called()
    assert words == [*launcher, recipe, "--data-dir", "my pictures", "--device", "npu", *fixed]
    check_arguments(words, shell.folder / "data")

    shell.run(script, "pictures", "swin_tiny", "--batch-size", "6", *(["--seed", "3"] if script != "eval.sh" else []))
    words = shell.called()
    expected = [*launcher, "swin_tiny", "--data-dir", "pictures", "--device", "npu", *fixed, "--batch-size", "6"]
    assert words[: len(expected)] == expected
    check_arguments(words, shell.folder / "data")

    shell.run(script, "pictures", "--batch-size", "6")
    assert shell.called() == [
        *[*launcher, recipe, "--data-dir", "pictures", "--device", "npu", *fixed],
        *["--batch-size", "6"],
    ]


@pytest.mark.parametrize("script", ["train_performance_1p.sh", "train_performance_8p.sh"])
def test_performance_needs_no_data(script: str, shell: Shell) -> None:
    shell.run(script, "synthetic", "--benchmark-steps", "20")
    words = shell.called()
    assert "--data-dir" not in words
    config = parse_command_line(words[words.index("classification.train") + 1 :])
    assert config.data.kind == "synthetic"
    assert config.train.benchmark_steps == 20  # the option wins over the script's 100


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_data_it_says_how_to_use_it(script: str, shell: Shell) -> None:
    for words in ([], [""], ["--batch-size", "6"]):
        wrong = shell.run(script, *words)
        assert wrong.returncode == 2
        assert wrong.stdout == ""
        assert wrong.stderr.startswith(f"usage: {script} DATA_DIR [")
        assert wrong.stderr.endswith("error: DATA_DIR is missing\n")
    asked = shell.run(script, "--help")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith(f"usage: {script} DATA_DIR [")
    assert not (shell.folder / "called").exists()
    for example in re.findall(rf"^    ({script} .*)", asked.stdout, re.MULTILINE):
        shell.run(*shlex.split(example))
        check_arguments(shell.called(), shell.folder / "data")


def test_cann_is_set_up(shell: Shell) -> None:
    def saw(**variables: str) -> list[str]:
        shell.run("train_full_8p.sh", "pictures", **variables)
        return (shell.folder / "saw").read_text().splitlines()

    assert saw() == ["set up ", "600", str(ROOT)]
    assert saw(ASCEND_HOME=f"{shell.folder}/Ascend/ascend-toolkit")[0] == "set up "
    assert saw(ASCEND_HOME="", HCCL_CONNECT_TIMEOUT="1800", ASCEND_HOME_PATH="/cann", PYTHONPATH="/mine") == [
        "none",  # this shell knows CANN already
        "1800",
        f"{ROOT}:/mine",
    ]


def test_without_cann_nothing_starts(shell: Shell) -> None:
    wrong = shell.run("train_full_8p.sh", "pictures", ASCEND_HOME="/nowhere")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert re.fullmatch("error: CANN was not found: .*ASCEND_HOME.*hvt doctor --npu.*\n", wrong.stderr)
    assert not (shell.folder / "called").exists()


def test_the_commands_of_the_readme_are_real(shell: Shell) -> None:
    """Scripts and trainer alike; what else is in its blocks (export, source, pip) is not looked at."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    checked = 0
    for line in blocks.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0].startswith("classification/npu/"):
            shell.run(Path(words[0]).name, *words[1:])
            words = shell.called()
        if {"classification.train", "classification.validate"} & set(words):
            check_arguments(words, shell.folder / "data")
            checked += 1
    assert checked >= 8
