"""Our loader beside timm's, torchvision's, WebDataset's and DALI's: pictures a second and core, memory, bytes sent.

    python -m benchmarks.data --folder FOLDER --out benchmarks/results/data.txt

All live in one process without workers, load batches in turn, and are timed by the processor time of the process, which
leaves out what other programs take: a core's share of any number of workers.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from classification.command_line import parse_command_line
from hvt_backbones.doctor import installed_version
from hvt_backbones.errors import exit_on_input_error, whole_number

from .measure import Clock, aligned, interleave, machine, paired_ratio, revision
from .photographs import write_photographs

SIZES = {"500x375": ((500, 375), 64), "2000x1500": ((2000, 1500), 16)}
SPLITS = ("train", "val")
BATCH = 16
Images = Iterator[Any]


class Setting(NamedTuple):
    folder: Path
    training: bool

    @property
    def split(self) -> Path:
        return self.folder / SPLITS[not self.training]

    @property
    def config(self) -> Any:
        words = ["--data-dir", str(self.folder), "--batch-size", str(BATCH), "--data.workers", "0", "--device", "cpu"]
        return parse_command_line(["swin_tiny", *words])


def ours(setting: Setting) -> Images:
    from classification.data import loading

    config = setting.config
    train, val = loading.open_data(config.data, config.augmentation)
    if not setting.training:
        yield from chain.from_iterable(repeat(loading.eval_loader(val, BATCH, 0, rank=0, world=1, pin=False)))
    loader = loading.train_loader(train, config.data, seed=0, rank=0, world=1, pin=False)
    for epoch in range(sys.maxsize):
        loader.batch_sampler.set_position(epoch, 0)
        yield from loader


def ours_on_the_device(setting: Setting) -> Images:
    """What is left to the device, here by the CPU, of batches that are there already."""
    from classification.data.loading import Batch, open_data

    data = open_data(setting.config.data, setting.config.augmentation)[not setting.training]
    images = torch.randint(256, (BATCH, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    assert data.finish is not None
    for first in range(0, sys.maxsize, BATCH):
        seeds = torch.arange(first, first + BATCH)
        yield Batch(data.finish(images, seeds.tolist()), seeds, seeds, seeds, [])


def timm_transform(setting: Setting, prefetcher: bool = False) -> Any:
    from timm.data import create_transform

    data, augmentation = setting.config.data, setting.config.augmentation
    training = {"auto_augment": augmentation.auto_augment, "re_prob": augmentation.random_erasing, "re_mode": "pixel"}
    return create_transform(
        data.input_size,
        is_training=setting.training,
        use_prefetcher=prefetcher,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        **(training if setting.training else {}),
    )


def timm(setting: Setting, *, prefetcher: bool = False) -> Images:
    from timm.data import ImageDataset, create_loader

    data, augmentation = setting.config.data, setting.config.augmentation
    loader = create_loader(
        ImageDataset(str(setting.split)),
        data.input_size,
        BATCH,
        is_training=setting.training,
        use_prefetcher=prefetcher,
        re_prob=augmentation.random_erasing if setting.training else 0.0,
        re_mode=augmentation.erasing_mode,
        auto_augment=augmentation.auto_augment,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        num_workers=0,
        device=torch.device("cpu"),
        pin_memory=False,
        persistent_workers=False,
    )
    # the prefetcher normalises and erases on the device: what is inside of it is the loader
    yield from chain.from_iterable(repeat(loader.loader if prefetcher else loader))


def timm_prefetcher(setting: Setting) -> Images:
    return timm(setting, prefetcher=True)


def torchvision(setting: Setting) -> Images:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import InterpolationMode, v2

    bicubic, data = InterpolationMode.BICUBIC, setting.config.data
    if setting.training:
        before: list[Any] = [
            v2.RandomResizedCrop(224, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR),  # of tensors it has no bicubic
        ]
        after: list[Any] = [v2.RandomErasing(0.25, value="random")]
    else:
        before, after = [v2.Resize(256, interpolation=bicubic, antialias=True), v2.CenterCrop(224)], []
    floats = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    transform = v2.Compose([v2.PILToTensor(), *before, *floats, *after])
    loader = DataLoader(ImageFolder(str(setting.split), transform), BATCH, shuffle=setting.training, drop_last=True)
    yield from chain.from_iterable(repeat(loader))


def webdataset(setting: Setting) -> Images:
    import webdataset as wds

    shard = setting.split.with_suffix(".tar")
    if not shard.exists():
        with tarfile.open(shard, "w") as archive:
            for path in sorted(setting.split.rglob("*.jpg")):
                archive.add(path, path.name)
    samples = (
        wds.WebDataset(str(shard), shardshuffle=False, empty_check=False).shuffle(64).decode("pil").to_tuple("jpg")
    )
    batches = samples.map_tuple(timm_transform(setting)).batched(BATCH, partial=False)
    yield from chain.from_iterable(repeat(batches))


def dali(setting: Setting) -> Images:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    @pipeline_def(enable_conditionals=True)
    def training() -> Any:
        files, labels = fn.readers.file(file_root=str(setting.split), random_shuffle=True)
        images = fn.decoders.image_random_crop(files, device="cpu", random_area=[0.08, 1.0])
        images = fn.resize(images, size=[224, 224], interp_type=types.INTERP_CUBIC, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        return rand_augment.rand_augment(images, n=2, m=9), labels

    @pipeline_def
    def evaluation() -> Any:
        files, labels = fn.readers.file(file_root=str(setting.split))
        images = fn.decoders.image(files, device="cpu")
        images = fn.resize(images, resize_shorter=256, interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.crop(images, crop=(224, 224)), labels

    # it must not work ahead while others are timed
    alone = {"exec_async": False, "exec_pipelined": False, "prefetch_queue_depth": 1}
    define = training if setting.training else evaluation
    pipeline = define(batch_size=BATCH, num_threads=1, device_id=None, **alone)
    pipeline.build()
    while True:
        yield [torch.from_numpy(pipeline.run()[0].as_array())]


LOADERS: dict[str, Callable[[Setting], Images]] = {
    "hvt": ours,
    "timm": timm,
    "timm, prefetcher": timm_prefetcher,
    "torchvision v2": torchvision,
    "webdataset": webdataset,
    "dali": dali,
    "(hvt: device's part)": ours_on_the_device,
}


def open_all(setting: Setting, names: Sequence[str]) -> tuple[dict[str, Images], dict[str, int]]:
    """The loaders that are installed, after their first batch, and the bytes of a picture of each."""
    streams, sent = {}, {}
    for name in names:
        stream = LOADERS[name](setting)
        try:
            images = next(stream)[0]
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        streams[name], sent[name] = stream, images.nbytes // len(images)
    return streams, sent


def take(stream: Images, batches: int) -> None:
    for _ in range(batches):
        next(stream)


def memory(folder: Path, name: str) -> float:
    """MiB of the largest resident size of a process that loads some batches, its libraries included."""
    words = ["--memory", name, "--folder", str(folder)]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.data", *words], capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


def measure_memory(setting: Setting, name: str) -> None:
    stream = LOADERS[name](setting)
    for _ in range(6):
        next(stream)
    # not `getrusage`, which begins with what the parent had
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


def rows(setting: Setting, rounds: int) -> Iterator[list[str]]:
    streams, sent = open_all(setting, list(LOADERS))
    files = sum(1 for _ in setting.split.rglob("*.jpg"))
    work = {name: partial(take, stream, files // BATCH) for name, stream in streams.items()}  # all of them in turn
    seconds = interleave(work, Clock(torch.device("cpu"), "process"), rounds=rounds, warmup=1, shortest=0)
    for name, times in seconds.items():
        each = statistics.median(times) / files
        low, ratio, high = paired_ratio(times, seconds["hvt"])
        yield [
            setting.folder.name,
            "training" if setting.training else "evaluation",
            name,
            f"{1000 * each:.2f}",
            f"{1 / each:.0f}",
            f"{ratio:.2f}",
            f"({low:.2f}-{high:.2f})",
            f"{sent[name] / 1000:.1f}",
        ]


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description="Compare our loader with others.")
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks/data"), help="of the drawn pictures")
    parser.add_argument("--rounds", type=whole_number(2), default=20)
    parser.add_argument("--out", type=Path, help="file of the table, beside the terminal")
    parser.add_argument("--memory", choices=LOADERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.memory:
        measure_memory(Setting(args.folder, training=True), args.memory)
        return
    packages = ("torch", "pillow", "timm", "torchvision", "webdataset", "nvidia-dali-cuda120")
    found = ", ".join(f"{name} {installed_version(name) or 'missing'}" for name in packages)
    lines = [
        f"python -m benchmarks.data {' '.join(sys.argv[1:] if argv is None else argv)}",
        f"{machine(torch.device('cpu'))['cpu']}, one thread, process clock, {found}, revision {revision()}",
    ]
    table = [["JPEGs", "transform", "loader", "ms", "per s, core", "x hvt", "(quartiles)", "kB sent"]]
    for label, (size, count) in SIZES.items():
        folder = args.folder / label
        write_photographs(folder, size, count)
        average = statistics.mean(path.stat().st_size for path in folder.rglob("*.jpg"))
        lines.append(f"{label}: {average / 1000:.0f} kB a JPEG")
        for training in (True, False):
            for row in rows(Setting(folder, training), args.rounds):
                print("  ".join(row), file=sys.stderr)
                table.append(row)
    text = "\n".join([*lines, aligned(table, 3)]) + "\n"
    print(text, end="")
    peaks = [f"{name} {memory(args.folder / label, name):.0f}" for name in dict.fromkeys(row[2] for row in table[1:])]
    text += f"MiB of a process that loads {label} for training, its libraries included: {', '.join(peaks)}\n"
    print(text.splitlines()[-1])
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
