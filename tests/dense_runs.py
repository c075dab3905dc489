"""What the tests of the commands of detection and segmentation share: tiny data, configurations, bad checkpoints."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.utils import ManagerMixin
from PIL import Image, ImageDraw

from tests.gloo import gloo_threads_are_gone
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64  # pixels
CLASSES = ("disc", "box")
CATEGORY_IDS = (3, 7)  # as COCO's, not 1, 2, ...
COLOURS = ((220, 40, 40), (40, 60, 220))

BACKBONE = {
    "type": "HVTBackbone", "name": "swin_tiny", "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2),
    "window_size": 4, "drop_path_rate": 0.0,
}  # fmt: skip


def draw(index: int) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """A picture with one or two shapes, and (class, box as left, top, right, bottom) of each."""
    random = np.random.default_rng(index)
    image = Image.fromarray(random.integers(90, 130, (SIDE, SIDE, 3), dtype=np.uint8))
    pen, shapes = ImageDraw.Draw(image), []
    for slot in range(1 + index % 2):
        label, size = (index + slot) % 2, int(random.integers(16, 26))
        left, top = int(random.integers(0, 6)) + 32 * slot, int(random.integers(0, SIDE - size))
        box = (left, top, min(left + size, SIDE), top + size)
        (pen.ellipse if label == 0 else pen.rectangle)((*box[:2], box[2] - 1, box[3] - 1), fill=COLOURS[label])
        shapes.append((label, box))
    return image, shapes


def draw_coco(root: Path, counts: dict[str, int]) -> Path:
    """COCO's layout below `root`: {"train2017": 4, "val2017": 2}."""
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            image, shapes = draw(index)
            name = f"{index:012}.jpg"
            image.save(root / split / name, quality=95)
            images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE})
            for label, (left, top, right, bottom) in shapes:
                width, height = right - left, bottom - top
                annotations.append({
                    "id": len(annotations) + 1, "image_id": index, "category_id": CATEGORY_IDS[label], "iscrowd": 0,
                    "bbox": [left, top, width, height], "area": width * height,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                })  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in zip(CATEGORY_IDS, CLASSES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def draw_ade(root: Path, counts: dict[str, int]) -> Path:
    """ADE20K's layout below `root`: {"training": 4, "validation": 2}; in the maps 0 is nothing, 1 the first class."""
    for split, count in counts.items():
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            image, shapes = draw(index)
            labels = Image.new("L", image.size, 1)
            pen = ImageDraw.Draw(labels)
            for label, box in shapes:
                pen.rectangle((*box[:2], box[2] - 1, box[3] - 1), fill=label + 2)
            image.save(root / "images" / split / f"ADE_{index:08}.jpg", quality=95)
            labels.save(root / "annotations" / split / f"ADE_{index:08}.png")
    return root


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    settings = {"custom_imports": {"imports": ["hvt_backbones.openmmlab"]}, **settings}
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in settings.items()) + "\n")
    return path


class Program:
    """What a pickle of an attacker holds: reading it in full writes the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.proof, "it ran")


def write_program(folder: Path) -> tuple[Path, Path]:
    """A checkpoint that runs a program when it is unpickled, and the file that this would write."""
    proof = folder / "proof.txt"
    path = folder / "program.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "meta": {"note": Program(proof)}}, path)
    return path, proof


@contextlib.contextmanager
def untouched_mmengine() -> Iterator[None]:
    """The commands change these for their process."""
    import mmengine.device.utils
    from mmengine.runner import CheckpointLoader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointLoader, "load_checkpoint", CheckpointLoader.__dict__["load_checkpoint"])
        patch.setattr(mmengine.device.utils, "DEVICE", mmengine.device.utils.DEVICE)
        forget_runs()
        yield


def forget_runs() -> None:
    """Runs of one second have one name, for which MMEngine has one logger and one visualizer: those of the first."""
    kinds = [ManagerMixin]
    for kind in kinds:
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


def logged(work_dir: Path) -> list[dict[str, Any]]:
    """What MMEngine recorded of a run, oldest first; of all tries, where it was resumed."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def error_line(capfd: pytest.CaptureFixture) -> str:
    """What a command that was refused said on stderr beside MMEngine's log: one line."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("error:", "Traceback"))]
    assert len(lines) == 1, lines
    return lines[0]


def in_two_processes(main: str, arguments: list[str]) -> list[int]:
    """The exit statuses of a command, as "segmentation.train:main", as two processes of one job."""
    # not forked: PyTorch refuses a backward pass in a fork of a process that has begun its threads for devices
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    children = [spawn.Process(target=_member, args=(main, arguments, rank, port)) for rank in range(2)]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(900)
        return [child.exitcode for child in children]
    finally:
        for child in children:
            child.kill()


def _member(main: str, arguments: list[str], rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    status = pkgutil.resolve_name(main)(arguments)
    assert gloo_threads_are_gone()
    sys.exit(status)


def torchrun(module: str, arguments: Sequence[str], processes: int = 2) -> subprocess.CompletedProcess:
    """The command `python -m MODULE` in several processes of one machine, on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, "-m", module, *arguments, "--launcher", "pytorch", "--device", "cpu"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
