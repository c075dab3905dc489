"""Typed settings of the trainer: a YAML recipe, then the command line, checked before anything starts.

Each section is a frozen dataclass whose fields carry their own help and limits; the order of authority is default,
recipe, command line. `parse_command_line` is the only entrance, so that a wrong key, type or value is always one
`InputError` line that names the key and what it accepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from hvt_backbones import InputError

LARGEST_BATCH = 100  # GB of pictures per device: no device holds more


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    length: int | None = None,
    flag: str | None = None,
) -> Any:
    """A field with its help, its limits (`low <= value <= high`, `value > above`) and its short command-line name."""
    limits = {"low": low, "high": high, "above": above, "length": length}
    metadata = {"help": help, "limits": limits, "flag": flag}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    name: str = setting(help="variant, as `hvt models` lists them")
    pretrained: bool | str = setting(False, "true, a weights tag (in1k, in22k, ...), a path or a URL")
    overrides: dict[str, Any] = setting({}, "constructor arguments instead of the variant's")  # noqa: RUF009
    class_map: str | None = setting(
        None, "file whose line k is the class of the pretrained head that class k takes its weights from"
    )
    freeze_stages: int = setting(0, "stages, from the first, that are not trained", low=0, high=100)
    freeze_backbone: bool = setting(False, "train the head alone, over features as in evaluation (linear probe)")
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, and how they become tensors."""

    kind: Literal["imagefolder", "tar", "wds", "hfds", "digits", "synthetic"] = setting(
        "imagefolder",
        "imagefolder: DIR/train/CLASS/*.png; tar: the same in DIR/train.tar or DIR/train/*.tar; wds: WebDataset shards "
        "DIR/train/*.tar; hfds: a Hugging Face dataset; digits: scikit-learn's handwritten digits, laid out as an "
        "imagefolder; synthetic: noise, to measure speed",
    )
    dir: str | None = setting(None, "folder of the data, or name of the Hugging Face dataset", flag="--data-dir")
    class_order: Literal["natural", "text"] = setting(
        "natural",
        "how class folders (imagefolder, tar) are numbered: natural has 9 before 10, text 10 before 9 as torchvision",
    )
    train_split: str = setting("train", "folder under data.dir, or split, to train on")
    val_split: str = setting("val", "folder under data.dir, or split, to evaluate on")
    synthetic_classes: int = setting(1000, "classes of synthetic data", low=1, high=1_000_000)
    synthetic_images: int = setting(
        51200, "training pictures of synthetic data; a tenth as many held out", low=1, high=10**9
    )
    repeated_augmentation: int = setting(1, "times that an epoch shows a picture, of as many fewer", low=1, high=100)
    on_error: Literal["fail", "skip"] = setting(
        "fail", "at a picture that cannot be read: end the run, or count it and go on without it"
    )
    max_errors: float = setting(
        0.01, "largest share of the pictures that data.on_error = skip passes over", low=0, high=1
    )
    input_size: tuple[int, ...] = setting((3, 224, 224), "channels, height, width", low=1, high=8192, length=3)
    mean: tuple[float, ...] = setting((0.485, 0.456, 0.406), "per channel, of pixels scaled to 0..1", low=0, high=1)
    std: tuple[float, ...] = setting((0.229, 0.224, 0.225), "per channel, of pixels scaled to 0..1", low=1e-3, high=1)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = setting("bicubic", "how pictures are resized")
    crop_pct: float = setting(0.875, "share of the resized picture that evaluation crops out", low=0.1, high=1)
    batch_size: int = setting(128, "pictures per device and batch", low=1, high=65536, flag="--batch-size")
    workers: int = setting(4, "processes per device that decode pictures; 0: the main one", low=0, high=256)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """timm's augmentation of the training pictures."""

    scale: tuple[float, ...] = setting((0.08, 1.0), "area of the random crop", above=0, high=1, length=2)
    ratio: tuple[float, ...] = setting((0.75, 4 / 3), "width / height of the random crop", low=0.01, high=100, length=2)
    hflip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float = setting(0.4, "brightness, contrast, saturation; unused with auto_augment", low=0, high=1)
    auto_augment: str | None = setting(None, "timm's policy string, e.g. rand-m9-mstd0.5-inc1")
    random_erasing: float = setting(0.0, "probability that a rectangle is erased", low=0, high=1)
    erasing_mode: Literal["const", "rand", "pixel"] = setting("pixel", "zeros, one colour, or noise per pixel")
    mixup: float = setting(0.0, "alpha of mixup; 0 is off", low=0, high=100)
    cutmix: float = setting(0.0, "alpha of cutmix; 0 is off", low=0, high=100)
    mix_prob: float = setting(1.0, "probability that a batch is mixed", low=0, high=1)
    switch_prob: float = setting(0.5, "probability of cutmix rather than mixup where both are on", low=0, high=1)
    label_smoothing: float = setting(0.1, "probability mass spread over all classes", low=0, high=0.99)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """timm's optimiser over the model's parameter groups."""

    name: str = setting("adamw", "of timm.optim.list_optimizers(): adamw, lamb, sgd, ...")
    lr: float = setting(1e-3, "peak learning rate", above=0, high=100, flag="--lr")
    lr_batch_size: int | None = setting(
        None,
        "global batch that the rates are stated for, to be scaled to the real one; null: as they are",
        low=1,
        high=10**6,
    )
    weight_decay: float = setting(0.05, "not applied to norms, biases and position tables", low=0, high=10)
    betas: tuple[float, ...] = setting((0.9, 0.999), "of Adam's moments", low=0, high=0.999999, length=2)
    eps: float = setting(1e-8, "added to Adam's denominator", above=0, high=1)
    layer_decay: float = setting(1.0, "factor of the learning rate per layer towards the input", above=0, high=1)
    clip_grad: float | None = setting(None, "largest global gradient norm; null does not clip", above=0, high=1e6)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """timm's schedule of the learning rate, updated every step."""

    name: Literal["cosine", "linear", "poly", "tanh", "constant"] = setting("cosine", "shape after the warm-up")
    warmup_epochs: int = setting(
        5, "epochs of linear warm-up, part of train.epochs; fewer in a shorter run", low=0, high=100_000
    )
    warmup_lr: float = setting(1e-6, "learning rate of the first step", low=0, high=100)
    min_lr: float = setting(1e-5, "learning rate at the end", low=0, high=100)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = setting(300, "passes over the training pictures", low=1, high=100_000, flag="--epochs")
    seed: int = setting(0, "of weights, order and augmentation", low=0, high=2**31 - 1, flag="--seed")
    device: Literal["auto", "cpu", "cuda", "npu"] = setting("auto", "auto takes an accelerator if any", flag="--device")
    amp: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "precision; auto: bf16 on accelerators that support it, else fp32; fp16 scales the loss"
    )
    compile: bool = setting(False, "torch.compile the model: minutes at the start, faster steps")
    threads: int | None = setting(
        None, "CPU threads of the model, beside data.workers; null: torch's choice", low=1, high=1024
    )
    accumulation: int = setting(1, "batches whose gradients make one step", low=1, high=65536)
    ema_decay: float = setting(
        0.0, "of an average of the weights, which is then evaluated and saved; 0 is off", low=0, high=0.999999
    )
    max_bad_steps: int = setting(
        3, "steps in a row with a loss or gradient that is no number, before the end", low=1, high=10**6
    )
    benchmark_steps: int | None = setting(
        None,
        "only measure: steps to time after a warm-up; nothing is saved",
        low=1,
        high=10**6,
        flag="--benchmark-steps",
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How several processes share the work; one process per device."""

    mode: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = setting(
        "ddp", "ddp: a whole model on each; fsdp2: PyTorch's shards; zero1, 2, 3: DeepSpeed's stages"
    )
    timeout: float = setting(
        600.0, "seconds that a process waits for the others before it gives up", low=1, high=604_800
    )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is left behind."""

    dir: str | None = setting(None, "folder of this run; null is outputs/RECIPE", flag="--output-dir")
    resume: str | None = setting(
        None, "auto continues the run in output.dir; or the folder of a run or of one checkpoint", flag="--resume"
    )
    overwrite: bool = setting(False, "replace a run that output.dir already holds", flag="--overwrite")
    allow_changes: bool = setting(
        False, "resume although settings differ from those of the checkpoint", flag="--allow-changes"
    )
    save_steps: int | None = setting(
        None, "steps between checkpoints, beside those after every epoch", low=1, high=10**9
    )
    keep_last: int = setting(2, "newest checkpoints that are kept", low=1, high=100_000)
    keep_best: int = setting(1, "checkpoints with the best top-1 that are kept", low=0, high=100_000)
    log_steps: int = setting(50, "steps between lines within an epoch and points of TensorBoard", low=1, high=10**9)
    tensorboard: bool = setting(True, "write TensorBoard events, where the package is installed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. Values are checked one by one on construction, then together here."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    output: OutputConfig = OutputConfig()

    def __post_init__(self) -> None:
        self._check_data()
        self._check_training()

    def _check_data(self) -> None:
        data, augmentation = self.data, self.augmentation
        channels, *sides = data.input_size
        if channels not in (1, 3):
            raise InputError(f"data.input_size: expected 1 (grey) or 3 (RGB) channels, not {channels}.")
        for key, values in {"data.mean": data.mean, "data.std": data.std}.items():
            if len(values) != channels:
                raise InputError(
                    f"{key}: {len(values)} values for {channels} channels in data.input_size; expected 1 each."
                )
        for key, bounds in {"augmentation.scale": augmentation.scale, "augmentation.ratio": augmentation.ratio}.items():
            if bounds[0] > bounds[1]:
                raise InputError(
                    f"{key}: the lower bound {bounds[0]:g} is above the upper bound {bounds[1]:g}; "
                    f"expected [{bounds[1]:g}, {bounds[0]:g}]."
                )
        gigabytes = 4e-9 * data.batch_size * channels * sides[0] * sides[1]
        if gigabytes > LARGEST_BATCH:
            raise InputError(
                f"data.batch_size: {data.batch_size} pictures of data.input_size {list(data.input_size)} are "
                f"{gigabytes:.0f} GB; must be at most {LARGEST_BATCH} GB."
            )
        if augmentation.mixes and data.batch_size % 2:
            raise InputError(
                f"data.batch_size: mixup and cutmix pair pictures, so expected an even number, got {data.batch_size}."
            )
        if data.kind == "synthetic" and data.synthetic_images < data.batch_size * self.train.accumulation:
            raise InputError(
                f"data.synthetic_images: {data.synthetic_images} do not fill one batch; must be at least "
                f"{data.batch_size * self.train.accumulation} (data.batch_size x train.accumulation)."
            )
        if data.kind not in ("digits", "synthetic") and data.dir is None:
            raise InputError(
                f"data.dir: missing; expected --data-dir DIR with DIR/{data.train_split} and DIR/{data.val_split}, "
                "for an imagefolder CLASS/*.jpg in each."
            )
        if data.kind != "synthetic" and PurePath(data.train_split) == PurePath(data.val_split):
            raise InputError(f"data.val_split: {data.val_split!r} is data.train_split too; expected other pictures.")

    def _check_training(self) -> None:
        model, optimizer, train, output = self.model, self.optimizer, self.train, self.output
        for key in ("min_lr", "warmup_lr"):
            if (value := getattr(self.schedule, key)) > optimizer.lr:
                raise InputError(
                    f"schedule.{key}: {value:g} is above optimizer.lr = {optimizer.lr:g}; must be at most that."
                )
        if train.amp == "fp16" and train.device == "cpu":
            raise InputError("train.amp: fp16 needs an accelerator; with train.device = cpu expected bf16 or fp32.")
        if train.amp == "fp16" and self.parallel.mode == "fsdp2":
            raise InputError("train.amp: fp16 does not go with parallel.mode = fsdp2; expected bf16 or fp32.")
        if train.amp == "fp16" and self.parallel.mode.startswith("zero"):
            raise InputError(
                f"train.amp: fp16 does not go with parallel.mode = {self.parallel.mode}; expected bf16 or fp32."
            )
        if train.ema_decay > 0 and self.parallel.mode == "zero3":
            raise InputError(
                "train.ema_decay: no process holds the weights of parallel.mode = zero3 to average; expected 0, or "
                "zero1, zero2, ddp or fsdp2."
            )
        if self.parallel.mode.startswith("zero") and train.device == "cpu":
            raise InputError(
                f"parallel.mode: {self.parallel.mode} needs an accelerator; expected ddp or fsdp2 on the CPU."
            )
        if model.class_map is not None and model.pretrained is False:
            raise InputError(
                "model.class_map: chooses among pretrained classes; expected model.pretrained, or null here."
            )
        if model.freeze_backbone and (model.freeze_stages or optimizer.layer_decay < 1):
            raise InputError(
                "model.freeze_backbone: leaves no stage to freeze or decay; expected model.freeze_stages = 0 and "
                "optimizer.layer_decay = 1 with it."
            )
        if output.resume and output.overwrite:
            raise InputError("output.resume: contradicts output.overwrite; expected one of the two.")
        if output.allow_changes and not output.resume:
            raise InputError("output.allow_changes: is about a resumed run; expected output.resume with it, or false.")
        if train.benchmark_steps is not None and output.resume:
            raise InputError("train.benchmark_steps: saves and reads no run; expected null with output.resume.")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON hold them."""
        return {section: _plain(values) for section, values in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
