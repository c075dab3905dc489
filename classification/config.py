"""Typed settings of the trainer: a YAML recipe, then the command line, checked before anything starts.

Each section is a frozen dataclass whose fields carry their own help and limits; the order of authority is default,
recipe, command line. `parse_command_line` is the only entrance, so that a wrong key, type or value is always one
`InputError` line that names the key and what it accepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, Literal

from hvt_backbones import InputError


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
    freeze_stages: int = setting(0, "stages, from the first, that are not trained", low=0)
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, more time")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, and how they become tensors."""

    kind: Literal["imagefolder", "digits"] = setting(
        "imagefolder", "imagefolder: DIR/train/CLASS/*.png; digits: scikit-learn's handwritten digits, laid out so"
    )
    dir: str | None = setting(None, "folder of the data; digits are laid out there", flag="--data-dir")
    train_split: str = setting("train", "folder under data.dir to train on")
    val_split: str = setting("val", "folder under data.dir to evaluate on")
    input_size: tuple[int, ...] = setting((3, 224, 224), "channels, height, width", low=1, high=8192, length=3)
    mean: tuple[float, ...] = setting((0.485, 0.456, 0.406), "per channel, of pixels scaled to 0..1")
    std: tuple[float, ...] = setting((0.229, 0.224, 0.225), "per channel, of pixels scaled to 0..1", above=0)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = setting("bicubic", "how pictures are resized")
    crop_pct: float = setting(0.875, "share of the resized picture that evaluation crops out", above=0, high=1)
    batch_size: int = setting(128, "pictures per device and step", low=1, flag="--batch-size")
    workers: int = setting(4, "processes per device that decode pictures; 0: the main one", low=0, high=256)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """timm's augmentation of the training pictures."""

    scale: tuple[float, ...] = setting((0.08, 1.0), "area of the random crop", above=0, high=1, length=2)
    ratio: tuple[float, ...] = setting((0.75, 4 / 3), "width / height of the random crop", above=0, length=2)
    hflip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float = setting(0.4, "brightness, contrast, saturation; unused with auto_augment", low=0, high=1)
    auto_augment: str | None = setting(None, "timm's policy string, e.g. rand-m9-mstd0.5-inc1")
    random_erasing: float = setting(0.0, "probability that a rectangle is erased", low=0, high=1)
    erasing_mode: Literal["const", "rand", "pixel"] = setting("pixel", "zeros, one colour, or noise per pixel")
    mixup: float = setting(0.0, "alpha of mixup; 0 is off", low=0)
    cutmix: float = setting(0.0, "alpha of cutmix; 0 is off", low=0)
    mix_prob: float = setting(1.0, "probability that a batch is mixed", low=0, high=1)
    switch_prob: float = setting(0.5, "probability of cutmix rather than mixup where both are on", low=0, high=1)
    label_smoothing: float = setting(0.1, "probability mass spread over all classes", low=0, high=0.99)

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """timm's optimiser over the model's parameter groups."""

    name: str = setting("adamw", "any of timm.optim.list_optimizers()")
    lr: float = setting(1e-3, "peak learning rate", above=0, high=100, flag="--lr")
    lr_batch_size: int | None = setting(
        None, "global batch that the rates are stated for, to be scaled to the real one; null: as they are", low=1
    )
    weight_decay: float = setting(0.05, "not applied to norms, biases and position tables", low=0, high=10)
    betas: tuple[float, ...] = setting((0.9, 0.999), "of Adam's moments", low=0, high=0.999999, length=2)
    eps: float = setting(1e-8, "added to Adam's denominator", above=0, high=1)
    layer_decay: float = setting(1.0, "factor of the learning rate per layer towards the input", above=0, high=1)
    clip_grad: float | None = setting(None, "largest global gradient norm; null does not clip", above=0)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """timm's schedule of the learning rate, updated every step."""

    name: Literal["cosine", "poly", "tanh", "constant"] = setting("cosine", "shape after the warm-up")
    warmup_epochs: int = setting(5, "epochs of linear warm-up, part of train.epochs; fewer in a shorter run", low=0)
    warmup_lr: float = setting(1e-6, "learning rate of the first step", low=0)
    min_lr: float = setting(1e-5, "learning rate at the end", low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    epochs: int = setting(300, "passes over the training pictures", low=1, high=100_000, flag="--epochs")
    seed: int = setting(0, "of weights, order and augmentation", low=0, high=2**31 - 1, flag="--seed")
    device: Literal["auto", "cpu", "cuda", "npu"] = setting("auto", "auto takes an accelerator if any", flag="--device")
    amp: Literal["no", "bf16", "fp16"] = setting("no", "mixed precision; fp16 scales the loss, and not on a CPU")
    threads: int | None = setting(None, "CPU threads of the model, beside data.workers; null: torch's choice", low=1)
    accumulation: int = setting(1, "batches whose gradients make one step", low=1)
    ema_decay: float = setting(
        0.0, "of an average of the weights, which is then evaluated and saved; 0 is off", low=0, high=0.999999
    )


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is left behind."""

    dir: str | None = setting(None, "folder of this run; null is outputs/RECIPE", flag="--output-dir")
    resume: str | None = setting(None, "auto continues the run in output.dir; or a checkpoint file", flag="--resume")
    overwrite: bool = setting(False, "replace a run that output.dir already holds", flag="--overwrite")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. Values are checked one by one on construction, then together here."""

    model: ModelConfig
    data: DataConfig = DataConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    output: OutputConfig = OutputConfig()

    def __post_init__(self) -> None:
        data, augmentation, train = self.data, self.augmentation, self.train
        channels = data.input_size[0]
        if channels not in (1, 3):
            raise InputError(f"data.input_size: pictures have 1 (grey) or 3 (RGB) channels, not {channels}.")
        for key, values in {"data.mean": data.mean, "data.std": data.std}.items():
            if len(values) != channels:
                raise InputError(f"{key}: {len(values)} values for {channels} channels in data.input_size.")
        for key, bounds in {"augmentation.scale": augmentation.scale, "augmentation.ratio": augmentation.ratio}.items():
            if bounds[0] > bounds[1]:
                raise InputError(f"{key}: the lower bound {bounds[0]} is above the upper bound {bounds[1]}; swap them.")
        if augmentation.mixes and data.batch_size % 2:
            raise InputError(f"data.batch_size: mixup and cutmix pair pictures, so {data.batch_size} must be even.")
        if data.kind == "imagefolder" and data.dir is None:
            raise InputError("data.dir: missing; give --data-dir DIR with DIR/train/CLASS/*.jpg, DIR/val/CLASS/*.jpg")
        if data.kind == "imagefolder" and data.train_split == data.val_split:
            raise InputError(f"data.val_split: {data.val_split!r} is data.train_split too; evaluate on other pictures.")
        for key in ("min_lr", "warmup_lr"):
            if (value := getattr(self.schedule, key)) > self.optimizer.lr:
                raise InputError(f"schedule.{key}: {value:g} is above optimizer.lr = {self.optimizer.lr:g}; lower it.")
        if train.amp == "fp16" and train.device == "cpu":
            raise InputError("train.amp: fp16 needs an accelerator; use bf16 or no with train.device = cpu.")
        if self.output.resume and self.output.overwrite:
            raise InputError("output.resume: contradicts output.overwrite; give one of the two.")

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON hold them."""
        return {section: _plain(values) for section, values in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
