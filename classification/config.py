"""Typed settings of the trainer: a YAML recipe, then the command line, checked before anything starts.

Each section is a frozen dataclass whose fields carry their own help and limits, which pydantic checks; the order of
authority is default, recipe, command line. `parse_command_line` is the only entrance of what users give, so that a
wrong key, type or value is always one `InputError` line that names the key and what it accepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked_dataclass

from hvt_backbones import InputError

LARGEST_BATCH = 100  # GB of pictures per device: no device holds more
CHECKED = ConfigDict(strict=True, allow_inf_nan=False)  # strict: true is no number, and 2.0 is no integer

Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*[^\p{Cc}\s]\P{Cc}*$")]  # no path or name has control characters


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class ModelConfig:
    """What is trained."""

    name: Text = Field(description="variant, as `hvt models` lists them")
    pretrained: bool | Text = Field(
        default=False, description="true, a weights tag (in1k, in22k, ...), a path or a URL"
    )
    overrides: dict[str, Any] = Field(default={}, description="constructor arguments instead of the variant's")
    class_map: Text | None = Field(
        default=None,
        description="file whose line k is the class of the pretrained head that class k takes its weights from",
    )
    freeze_stages: int = Field(default=0, ge=0, le=100, description="stages, from the first, that are not trained")
    freeze_backbone: bool = Field(
        default=False, description="train the head alone, over features as in evaluation (linear probe)"
    )
    grad_checkpointing: bool | Literal["block", "stage", "attention", "mlp"] = Field(
        default=False,
        description="recompute activations in the backward pass, of a whole block (true) or stage, or of each block's "
        "attention or MLP: less memory, more time",
    )
    max_logits: int | None = Field(
        default=None,
        ge=1,
        le=10**12,
        description="attention logits that are made at a time, for large windows and pictures; null: all at once",
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class DataConfig:
    """Which pictures, and how they become tensors."""

    kind: Literal["imagefolder", "tar", "wds", "hfds", "mnist", "digits", "synthetic"] = Field(
        default="imagefolder",
        description="imagefolder: DIR/train/CLASS/*.png; tar: the same in DIR/train.tar or DIR/train/*.tar; wds: "
        "WebDataset shards DIR/train/*.tar; hfds: a Hugging Face dataset; mnist: the files of MNIST "
        "and Fashion-MNIST, DIR/train-images-idx3-ubyte.gz and so on; digits: scikit-learn's handwritten digits, laid "
        "out as an imagefolder; synthetic: noise, to measure speed",
    )
    dir: Text | None = Field(default=None, description="folder of the data, or name of the Hugging Face dataset")
    class_order: Literal["natural", "text"] = Field(
        default="natural",
        description="how class folders (imagefolder, tar) are numbered: natural has 9 before 10, text 10 before 9 as "
        "torchvision",
    )
    train_split: Text = Field(default="train", description="folder under data.dir, or split, to train on")
    val_split: Text = Field(default="val", description="folder under data.dir, or split, to evaluate on")
    train_share: float = Field(
        default=1.0, gt=0, le=1, description="share of each class's training pictures that is used, drawn by train.seed"
    )
    synthetic_classes: int = Field(default=1000, ge=1, le=1_000_000, description="classes of synthetic data")
    synthetic_images: int = Field(
        default=51200, ge=1, le=10**9, description="training pictures of synthetic data; a tenth as many held out"
    )
    repeated_augmentation: int = Field(
        default=1, ge=1, le=100, description="times that an epoch shows a picture, of as many fewer"
    )
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="at a picture that cannot be read: end the run, or count it and go on without it"
    )
    max_errors: Share = Field(
        default=0.01, description="largest share of the pictures that data.on_error = skip passes over"
    )
    input_size: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(3, 224, 224), min_length=3, max_length=3, description="channels, height, width"
    )
    mean: tuple[Share, ...] = Field(default=(0.485, 0.456, 0.406), description="per channel, of pixels scaled to 0..1")
    std: tuple[Annotated[float, Field(ge=1e-3, le=1)], ...] = Field(
        default=(0.229, 0.224, 0.225), description="per channel, of pixels scaled to 0..1"
    )
    interpolation: Literal["bicubic", "bilinear", "nearest"] = Field(
        default="bicubic", description="how pictures are resized"
    )
    crop_pct: float = Field(
        default=0.875, ge=0.1, le=1, description="share of the resized picture that evaluation crops out"
    )
    batch_size: int = Field(default=128, ge=1, le=65536, description="pictures per device and batch")
    workers: int = Field(
        default=4, ge=0, le=256, description="processes per device that decode pictures; 0: the main one"
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class AugmentationConfig:
    """timm's augmentation of the training pictures."""

    scale: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        default=(0.08, 1.0), min_length=2, max_length=2, description="area of the random crop"
    )
    ratio: tuple[Annotated[float, Field(ge=0.01, le=100)], ...] = Field(
        default=(0.75, 4 / 3), min_length=2, max_length=2, description="width / height of the random crop"
    )
    hflip: Share = Field(default=0.5, description="probability of a horizontal flip")
    color_jitter: Share = Field(default=0.4, description="brightness, contrast, saturation; unused with auto_augment")
    auto_augment: Text | None = Field(default=None, description="timm's policy string, e.g. rand-m9-mstd0.5-inc1")
    random_erasing: Share = Field(default=0.0, description="probability that a rectangle is erased")
    erasing_mode: Literal["const", "rand", "pixel"] = Field(
        default="pixel", description="zeros, one colour, or noise per pixel"
    )
    mixup: float = Field(default=0.0, ge=0, le=100, description="alpha of mixup; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, le=100, description="alpha of cutmix; 0 is off")
    mix_prob: Share = Field(default=1.0, description="probability that a batch is mixed")
    switch_prob: Share = Field(default=0.5, description="probability of cutmix rather than mixup where both are on")
    label_smoothing: float = Field(default=0.1, ge=0, le=0.99, description="probability mass spread over all classes")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class SimmimConfig:
    """Masked image modelling, with train.task = simmim."""

    mask_ratio: float = Field(default=0.6, gt=0, lt=1, description="share of a picture that is hidden, at least")
    mask_patch_size: int = Field(default=32, ge=1, le=8192, description="side of a hidden square, pixels")
    norm_target: int | None = Field(
        default=None,
        ge=3,
        le=8191,
        description="odd side of the square around a pixel by which it is normalised before it is compared",
    )
    picture_epochs: int = Field(
        default=10, ge=0, le=100_000, description="epochs between pictures of input, mask and reconstruction; 0: none"
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class OptimizerConfig:
    """timm's optimiser over the model's parameter groups."""

    name: Text = Field(default="adamw", description="of timm.optim.list_optimizers(): adamw, lamb, sgd, ...")
    lr: float = Field(default=1e-3, gt=0, le=100, description="peak learning rate")
    lr_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="global batch that the rates are stated for, to be scaled to the real one; null: as they are",
    )
    weight_decay: float = Field(
        default=0.05, ge=0, le=10, description="not applied to norms, biases and position tables"
    )
    betas: tuple[Annotated[float, Field(ge=0, le=0.999999)], ...] = Field(
        default=(0.9, 0.999), min_length=2, max_length=2, description="of Adam's moments"
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="added to Adam's denominator")
    layer_decay: float = Field(
        default=1.0, gt=0, le=1, description="factor of the learning rate per layer towards the input"
    )
    clip_grad: float | None = Field(
        default=None, gt=0, le=1e6, description="largest global gradient norm; null does not clip"
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class ScheduleConfig:
    """timm's schedule of the learning rate, updated every step."""

    name: Literal["cosine", "linear", "poly", "tanh", "multistep", "constant"] = Field(
        default="cosine", description="shape after the warm-up"
    )
    milestones: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = Field(
        default=(), description="of multistep: epochs from each of which the rate is a tenth of what it was"
    )
    warmup_epochs: int = Field(
        default=5,
        ge=0,
        le=100_000,
        description="epochs of linear warm-up, part of train.epochs; fewer in a shorter run",
    )
    warmup_lr: float = Field(default=1e-6, ge=0, le=100, description="learning rate of the first step")
    min_lr: float = Field(default=1e-5, ge=0, le=100, description="learning rate at the end")


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class TrainConfig:
    """The loop."""

    task: Literal["classification", "simmim"] = Field(
        default="classification",
        description="what is learnt: the classes, or (Swin and SwinV2) to paint what is hidden, see simmim",
    )
    epochs: int = Field(default=300, ge=1, le=100_000, description="passes over the training pictures")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of weights, order and augmentation")
    device: Literal["auto", "cpu", "cuda", "npu"] = Field(
        default="auto", description="auto takes an accelerator if any"
    )
    amp: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto",
        description="precision; auto: bf16 on accelerators that support it, else fp32; fp16 scales the loss",
    )
    compile: bool = Field(default=False, description="torch.compile the model: minutes at the start, faster steps")
    threads: int | None = Field(
        default=None, ge=1, le=1024, description="CPU threads of the model, beside data.workers; null: torch's choice"
    )
    accumulation: int = Field(default=1, ge=1, le=65536, description="batches whose gradients make one step")
    ema_decay: float = Field(
        default=0.0,
        ge=0,
        le=0.999999,
        description="of an average of the weights, which is then evaluated and saved; 0 is off",
    )
    max_bad_steps: int = Field(
        default=3,
        ge=1,
        le=10**6,
        description="steps in a row with a loss or gradient that is no number, before the end",
    )
    benchmark_steps: int | None = Field(
        default=None, ge=1, le=10**6, description="only measure: steps to time after a warm-up; nothing is saved"
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class ParallelConfig:
    """How several processes share the work; one process per device."""

    mode: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        default="ddp",
        description="ddp: a whole model on each; fsdp2: PyTorch's shards; zero1, 2, 3: DeepSpeed's stages",
    )
    cpu_offload: bool = Field(
        default=False, description="of mode fsdp2: shards, gradients and optimiser stay on the CPU, which is slow"
    )
    timeout: float = Field(
        default=600.0, ge=1, le=604_800, description="seconds that a process waits for the others before it gives up"
    )


@checked_dataclass(frozen=True, kw_only=True, config=CHECKED)
class OutputConfig:
    """What is left behind."""

    dir: Text | None = Field(default=None, description="folder of this run; null is outputs/RECIPE")
    resume: Text | None = Field(
        default=None, description="auto continues the run in output.dir; or the folder of a run or of one checkpoint"
    )
    overwrite: bool = Field(default=False, description="replace a run that output.dir already holds")
    allow_changes: bool = Field(
        default=False, description="resume although settings differ from those of the checkpoint"
    )
    save_steps: int | None = Field(
        default=None, ge=1, le=10**9, description="steps between checkpoints, beside those after every epoch"
    )
    keep_last: int = Field(default=2, ge=1, le=100_000, description="newest checkpoints that are kept")
    keep_best: int = Field(
        default=1, ge=0, le=100_000, description="checkpoints with the best top-1 (simmim: loss) that are kept"
    )
    log_steps: int = Field(
        default=50, ge=1, le=10**9, description="steps between lines within an epoch and points of TensorBoard"
    )
    sharded: bool = Field(
        default=False,
        description="of parallel.mode fsdp2: every process writes its part of a checkpoint, and none gathers it whole",
    )
    diagnose_steps: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="steps between diagnoses as of `hvt diagnose`, with a warning before a blow-up, such as 100; null: "
        "none",
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard events, where the package is installed")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that defines a run. Values are checked one by one on construction, then together here."""

    model: ModelConfig
    data: DataConfig
    augmentation: AugmentationConfig
    simmim: SimmimConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: TrainConfig
    parallel: ParallelConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        self._check_data()
        self._check_training()
        self._check_task()

    @property
    def masked(self) -> SimmimConfig | None:
        """The settings of SimMIM where it is the task."""
        return self.simmim if self.train.task == "simmim" else None

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
        if self.parallel.cpu_offload and self.parallel.mode != "fsdp2":
            raise InputError(
                f"parallel.cpu_offload: goes with fsdp2, and parallel.mode = {self.parallel.mode}; expected false here."
            )
        if train.amp == "fp16" and self.parallel.mode.startswith("zero"):
            raise InputError(
                f"train.amp: fp16 does not go with parallel.mode = {self.parallel.mode}; expected bf16 or fp32."
            )
        if train.ema_decay > 0 and self.parallel.mode == "zero3":
            raise InputError(
                "train.ema_decay: no process holds the weights of parallel.mode = zero3 to average; expected 0, or "
                "zero1, zero2, ddp or fsdp2."
            )
        if self.parallel.mode.startswith("zero") and output.diagnose_steps is not None:
            raise InputError(
                f"output.diagnose_steps: parallel.mode = {self.parallel.mode} keeps weights and gradients to itself; "
                "expected null, or ddp or fsdp2."
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
        if output.sharded and self.parallel.mode != "fsdp2":
            raise InputError(
                f"output.sharded: parallel.mode = {self.parallel.mode} has no shards; expected false, or fsdp2."
            )
        if output.resume and output.overwrite:
            raise InputError("output.resume: contradicts output.overwrite; expected one of the two.")
        if output.allow_changes and not output.resume:
            raise InputError("output.allow_changes: is about a resumed run; expected output.resume with it, or false.")
        if train.benchmark_steps is not None and output.resume:
            raise InputError("train.benchmark_steps: saves and reads no run; expected null with output.resume.")

    def _check_task(self) -> None:
        schedule, norm_target = self.schedule, self.simmim.norm_target
        if (schedule.name == "multistep") != bool(schedule.milestones):
            raise InputError(
                f"schedule.milestones: {list(schedule.milestones)} with schedule.name = {schedule.name}; expected "
                "epochs with multistep, and none with another."
            )
        if norm_target is not None and norm_target % 2 == 0:
            raise InputError(f"simmim.norm_target: {norm_target} has no middle; expected an odd number, or null.")
        if self.masked is None:
            return
        model, augmentation = self.model, self.augmentation
        for key, given in (
            ("model.class_map", model.class_map is not None),
            ("model.freeze_stages", model.freeze_stages > 0),
            ("model.freeze_backbone", model.freeze_backbone),
            ("augmentation.mixup", augmentation.mixup > 0),
            ("augmentation.cutmix", augmentation.cutmix > 0),
        ):
            if given:
                raise InputError(
                    f"{key}: is for classes, and train.task = simmim learns none; expected its default with it."
                )

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as YAML and JSON hold them."""
        return {section: _plain(values) for section, values in asdict(self).items()}


def _plain(value: Any) -> Any:
    # not by pydantic: it writes inf as null, and a key that is a number as text
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
