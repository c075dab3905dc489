"""CONTRIBUTING.md adds a backbone when it is followed to the letter, and its proof can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import ROOT

DOCUMENT = (ROOT / "CONTRIBUTING.md").read_text()
FAMILY_FILE = "hvt_backbones/poolnet.py"

# What a newcomer has: the authors' code. Written from the description alone, channels-first, with other names.
OFFICIAL = """
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weight[:, None, None] + self.bias[:, None, None]


class Embed(nn.Module):
    def __init__(self, in_dim, dim, patch):
        super().__init__()
        self.patch = patch
        self.conv = nn.Conv2d(in_dim, dim, patch, patch)
        self.norm = Norm(dim)

    def forward(self, x):
        height, width = x.shape[2:]
        return self.norm(self.conv(F.pad(x, (0, -width % self.patch, 0, -height % self.patch))))


class Layer(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.mix = nn.Linear(dim, dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)

    def forward(self, x):
        y = self.norm1(x)
        box = y.new_ones(y.shape[1], 1, 3, 3)
        total = F.conv2d(y, box, padding=1, groups=y.shape[1])
        count = F.conv2d(torch.ones_like(y), box, padding=1, groups=y.shape[1])
        x = x + torch.einsum("oc,bchw->bohw", self.mix.weight, total / count) + self.mix.bias[:, None, None] - y
        return x + self.conv2(F.gelu(self.conv1(self.norm2(x))))


class PoolNet(nn.Module):
    def __init__(self, dims, layers, mlp_ratio, num_classes):
        super().__init__()
        sides = [4] + [2] * (len(dims) - 1)
        self.embeds = nn.ModuleList(map(Embed, [3, *dims], dims, sides))
        self.layers = nn.ModuleList(
            nn.ModuleList(Layer(dim, dim * mlp_ratio) for _ in range(depth)) for dim, depth in zip(dims, layers)
        )
        for i, dim in enumerate(dims):
            self.add_module(f"norm{i + 1}", Norm(dim))
        self.head = nn.Linear(dims[-1], num_classes)

    def forward_features(self, x):
        maps = []
        for i, layers in enumerate(self.layers):
            x = self.embeds[i](x)
            for layer in layers:
                x = layer(x)
            x = getattr(self, f"norm{i + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.head(self.forward_features(x)[-1].mean((2, 3)))
"""


@dataclass(frozen=True)
class Step:
    """A code block, and the file that the line before it names."""

    kind: str
    text: str
    file: str


def steps(document: str) -> Iterator[Step]:
    """The code blocks of the section that adds a backbone, in its order."""
    section = document.partition("\n## Add a backbone\n")[2].partition("\n## ")[0]
    block = r"(?:^(File|In) `([^`\n]+)`:\n\n)?^```(\w+)\n(.*?)^```$"
    for verb, file, kind, text in re.findall(block, section, re.DOTALL | re.MULTILINE):
        assert {"python": "File", "diff": "In", "bash": ""}[kind] == verb, f"say what becomes of the block:\n{text}"
        yield Step(kind, text, file)


def patched(source: str, diff: str, file: str) -> str:
    """`source` with every hunk applied; hunks are parted by @@ and carry no line numbers."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-"), f"not a diff:\n{hunk}"
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        parts = re.split(rf"^{re.escape(old)}", source, flags=re.MULTILINE)
        assert len(parts) == 2, f"CONTRIBUTING.md changes lines that {file} has {len(parts) - 1} times:\n{old}"
        source = new.join(parts)
    return source


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of the document in a checkout, with the Python that runs the tests."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("HVT_", "PYTEST_"))}
    return subprocess.run(
        ["bash", "-ec", command.replace(".venv/bin/python", sys.executable)],
        cwd=folder,
        env={**own, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def passed(output: str) -> int:
    """How many tests passed, where nothing else happened to any."""
    summary = re.search(r"=+ (?:(\d+) passed)(?:, \d+ deselected)? in [^\n]*=+\s*\Z", output)
    assert summary is not None, output
    return int(summary[1])


@dataclass(frozen=True)
class Followed:
    checkout: Path
    outputs: dict[str, str]

    def output(self, word: str) -> str:
        """What the one command with this word in it printed."""
        (found,) = (text for command, text in self.outputs.items() if word in command)
        return found


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """A checkout in which the section was followed from its first block to its last."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("hvt_backbones", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "classification", ".*")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "official_poolnet.py").write_text(OFFICIAL)
    outputs = {}
    for step in steps(DOCUMENT):
        if step.kind == "bash":
            result = run(step.text, checkout)
            assert result.returncode == 0, f"{step.text}\n{result.stdout}"
            outputs[step.text] = result.stdout
            continue
        path = checkout / step.file
        assert path.exists() == (step.kind == "diff"), step.file
        path.write_text(patched(path.read_text(), step.text, step.file) if step.kind == "diff" else step.text)
    return Followed(checkout, outputs)


@pytest.mark.slow
def test_the_model_is_built_by_its_name(followed: Followed) -> None:
    shapes = "[(1, 128, 13, 17), (1, 320, 7, 9), (1, 512, 4, 5)]\n(2, 10)\n"
    assert followed.output("create_backbone") == shapes
    assert followed.output("models --markdown").splitlines()[2:] == ["| poolnet_s12 | 224 | 12.0 | 1.9 | - |  |"]


@pytest.mark.slow
def test_the_tests_run_for_the_new_family_and_pass(followed: Followed) -> None:
    def of_all_families(file: str) -> int:
        return len(re.findall(r"^@(?:families|pytest.mark.parametrize\(\"family\", TINY\))$", file, re.MULTILINE))

    promises = of_all_families((ROOT / "tests/test_backbone.py").read_text())
    promises += of_all_families((ROOT / "tests/test_properties.py").read_text())
    assert passed(followed.output("test_backbone.py")) >= promises > 15
    assert passed(followed.output("test_variants.py")) == 3


@pytest.mark.slow
def test_the_reference_cases_pass(followed: Followed) -> None:
    assert passed(followed.output("test_reference.py")) == 4  # two cases in two precisions


@pytest.mark.slow
def test_the_code_of_the_document_is_clean(followed: Followed) -> None:
    files = " ".join(sorted({step.file for step in steps(DOCUMENT) if step.file}))
    for check in ("check", "format --check"):
        result = run(f".venv/bin/python -m ruff {check} --no-cache {files}", followed.checkout)
        assert result.returncode == 0, result.stdout


BREAKS = {
    "border": ("count_include_pad=False", "count_include_pad=True"),
    "eps": ("norm_eps: float = 1e-6", "norm_eps: float = 1e-5"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_line_in_the_family_fails_the_proof(followed: Followed, name: str) -> None:
    path = followed.checkout / FAMILY_FILE
    right = path.read_text()
    assert right.count(BREAKS[name][0]) == 1
    path.write_text(right.replace(*BREAKS[name]))
    try:
        (command,) = (command for command in followed.outputs if "test_reference.py" in command)
        result = run(command.splitlines()[-1] + " --tb=short", followed.checkout)
    finally:
        path.write_text(right)
    assert result.returncode == 1
    assert len(re.findall(r"^E +AssertionError: \(error, limit\)", result.stdout, re.MULTILINE)) == 4, result.stdout


def test_every_command_and_file_of_the_document_is_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", DOCUMENT, re.MULTILINE))
    assert {"install", "test-fast", "test", "lint"} <= named <= targets
    made = {step.file for step in steps(DOCUMENT) if step.kind == "python"}
    files = set(re.findall(r"`([\w./]+/[\w.]*\.\w+|[A-Z]+\.md|\.ci/run)`", DOCUMENT))
    assert len(files) > 8
    assert [file for file in sorted(files - made) if not (ROOT / file).exists()] == []
