"""`train`, `test` and `info` of detection, segmentation and video, and the model that `predict` uses."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import BaseLoop, Runner, load_checkpoint
from torch import nn

from hvt_backbones.atomic import whole_file
from hvt_backbones.errors import ArgumentParser, InputError, whole_number
from hvt_backbones.images import Reading
from hvt_backbones.openmmlab import HVTResumeHook, check_checkpoint
from hvt_backbones.processes import leave_processes

from . import patches
from .application import Application
from .bad_steps import BadStepHook, DivergedError, keep_sources
from .changes import check_changes, resume_changed
from .checkpoints import find_latest
from .config import add_config_arguments, building, open_config
from .data import check_data
from .devices import join_processes, use_amp, use_device
from .findings import LONGEST, describe
from .parts import check_classes, check_parts, data_of
from .quiet import quiet_logger

METRICS = "metrics.json"


def build_parser(application: Application, command: str, description: str) -> argparse.ArgumentParser:
    """A parser with what every command takes: CONFIG, --cfg-options, --device."""
    parser = ArgumentParser(prog=f"python -m {application.name}.{command}", description=description, allow_abbrev=False)
    add_config_arguments(parser, application)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="default: auto")
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work-dir", metavar="DIR", help="of logs and checkpoints (default outputs/CONFIG)")
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm"), default="none", help="pytorch: started by torchrun"
    )


def train(argv: Sequence[str] | None, application: Application) -> int:
    """Train as a configuration says."""
    parser = build_parser(application, "train", "Train a model.")
    _add_run_options(parser)
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE, or the last checkpoint in DIR"
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="auto",
        choices=("auto", "bf16", "fp16"),
        help="mixed precision (auto: fp16, on the CPU bf16)",
    )
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size of all processes"
    )
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume with settings that differ from the checkpoint's"
    )
    parser.add_argument(
        "--max-bad-steps",
        type=whole_number(1),
        default=3,
        metavar="N",
        help="steps in a row with a loss or gradient that is no number, before the end (default 3)",
    )
    args = parser.parse_args(argv)
    cfg, device = _prepare(args, application)
    if args.amp:
        use_amp(cfg, args.amp, device, application.amp_part)
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise InputError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size to scale from")
        cfg.auto_scale_lr.enable = True
    _find_start(cfg, args.resume)
    changed = bool(cfg.get("resume") and cfg.get("load_from")) and check_changes(
        cfg, cfg.load_from, allowed=args.allow_changes
    )
    check_data(cfg, ("train", "val"), application.layout)
    keep_sources(cfg)
    try:
        _run(args, cfg, device, partial(_train, changed=changed, max_bad_steps=args.max_bad_steps))
    except DivergedError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def _find_start(cfg: Config, resume: str | None) -> None:
    """Set what a run starts from, checked: the checkpoint to resume, or `load_from`."""
    latest = None
    if resume == "auto" or (resume is None and cfg.get("resume") and not cfg.get("load_from")):
        latest = find_latest(cfg.work_dir)
    if resume not in (None, "auto") or latest is not None:
        cfg.load_from, cfg.resume = str(latest or resume), True
    elif resume == "auto":
        print(f"{cfg.work_dir} holds no checkpoint yet: starting from the beginning")
        cfg.resume = False
    if cfg.get("load_from"):
        cfg.load_from = str(check_checkpoint(cfg.load_from))


def test(argv: Sequence[str] | None, application: Application) -> None:
    """Evaluate a checkpoint; prints the metrics and writes them to `metrics.json` in the working folder."""
    parser = build_parser(application, "test", "Evaluate a checkpoint on the test data of a configuration.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a URL")
    _add_run_options(parser)
    if application.scope == "mmseg":
        parser.add_argument("--tta", action="store_true", help="average over sizes and mirror images")
    args = parser.parse_args(argv)
    cfg, device = _prepare(args, application)
    cfg.load_from, cfg.resume = str(check_checkpoint(args.checkpoint)), False
    tta = vars(args).get("tta", False)
    if tta:
        _use_tta(cfg)
    check_data(cfg, ("test",), application.layout)
    metrics = _run(args, cfg, device, _test)
    if is_main_process():
        path = Path(cfg.work_dir) / METRICS
        write_json(path, {"config": args.config, "checkpoint": args.checkpoint, "tta": tta, "metrics": metrics})
        print("\n".join(f"{name:<24} {value:.4g}" for name, value in metrics.items()))
        print(f"written to {path}")


def _use_tta(cfg: Config) -> None:
    """Test by the configuration's `tta_pipeline` and `tta_model`."""
    if "tta_pipeline" not in cfg:
        raise InputError("--tta: the config has no tta_pipeline, which says the sizes and the flip")
    for dataset in data_of(cfg, "test"):
        dataset["pipeline"] = cfg.tta_pipeline
    from .averaging import AveragingTTAModel

    tta_model = cfg.get("tta_model", {"type": "SegTTAModel"})
    if tta_model["type"] in ("SegTTAModel", "mmseg.SegTTAModel"):
        tta_model = {**tta_model, "type": AveragingTTAModel}
    cfg.model = {**tta_model, "module": cfg.model}


def _prepare(args: argparse.Namespace, application: Application) -> tuple[Config, torch.device]:
    patches.apply(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    application.adapt(cfg)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or os.path.join("outputs", Path(cfg.filename).stem)
    return cfg, use_device(args.device)


def _run(args: argparse.Namespace, cfg: Config, device: torch.device, method: Callable[[Config], Any]) -> Any:
    make_folder("--work-dir", cfg.work_dir)
    join_processes(args.launcher, device, cfg)
    try:
        with building(args.config):
            return method(cfg)
    finally:
        leave_processes()


def _train(cfg: Config, *, changed: bool, max_bad_steps: int) -> None:
    runner = CommandRunner.from_cfg(cfg)
    runner.changed = changed
    runner.register_hook(BadStepHook(max_bad_steps))
    try:
        runner.train()
    except ValueError as error:  # PyTorch has no other sign of it; in other words, it is a traceback again
        if "more than 1 value per channel" not in str(error):
            raise
        size = runner.train_dataloader.batch_size
        raise InputError(
            f"train_dataloader.batch_size is {size}: a batch norm of the model, such as after pooling to a pixel, gets "
            f"one number per channel, which it cannot norm: give it {size + 1} or more pictures"
        ) from error


def _test(cfg: Config) -> dict[str, float]:
    runner = CommandRunner.from_cfg(cfg)
    runner.strict = True
    return runner.test()


def make_folder(option: str, folder: str | Path) -> None:
    """
    Raises:
        InputError: it cannot be made, or not be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise InputError(f"{option} {folder} is no folder that can be written ({reason}): name another")


class CommandRunner(Runner):
    strict = False  # in training, `load_from` takes what fits
    changed = False  # whether a resumed run has other settings than its checkpoint

    def build_logger(self, *args: Any, **arguments: Any) -> MMLogger:
        logger = super().build_logger(*args, **arguments)
        quiet_logger(logger)
        return logger

    def register_hooks(self, *args: Any, **arguments: Any) -> None:
        super().register_hooks(*args, **arguments)
        if not any(isinstance(hook, HVTResumeHook) for hook in self.hooks):
            self.register_hook(HVTResumeHook())

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        if self.distributed and get_device() == "cpu":  # PyTorch's SyncBatchNorm is for accelerators
            model = revert_sync_batchnorm(model)
        return super().wrap_model(model_wrapper_cfg, model)

    def build_model(self, model: Any) -> nn.Module:
        model = super().build_model(model)
        check_parts(model)
        return model

    def build_train_loop(self, loop: Any) -> BaseLoop:
        return self._checked(super().build_train_loop(loop), "training")

    def build_val_loop(self, loop: Any) -> BaseLoop:
        return self._checked(super().build_val_loop(loop), "validation")

    def build_test_loop(self, loop: Any) -> BaseLoop:
        return self._checked(super().build_test_loop(loop), "test")

    def _checked(self, loop: BaseLoop, data: str) -> BaseLoop:
        check_classes(self.model, getattr(loop.dataloader.dataset, "metainfo", {}), data)
        return loop

    def load_checkpoint(self, filename: str, *args: Any, **arguments: Any) -> Any:
        parameters = list(self.model.parameters())
        versions = [parameter._version for parameter in parameters]
        with _matching(filename):  # weights that are missing would be random
            content = super().load_checkpoint(filename, *args, **{"strict": self.strict or self._resume, **arguments})
        if versions == [parameter._version for parameter in parameters]:
            raise InputError(
                f"{filename} has no key of the config's model, so nothing was loaded: give the weights of a backbone "
                "by --cfg-options model.backbone.pretrained=FILE"
            )
        return content

    def resume(self, filename: str, *args: Any, **arguments: Any) -> None:
        try:
            if self.changed and isinstance(self.optim_wrapper, OptimWrapper):
                resume_changed(self, partial(super().resume, filename, resume_param_scheduler=False))
            else:
                super().resume(filename, *args, **arguments)
        except InputError:
            raise
        except (KeyError, ValueError) as error:
            raise InputError(
                f"{filename} is no checkpoint of this run ({describe(error)}): for its weights alone, "
                f"leave --resume out and give --cfg-options load_from={filename}"
            ) from error


@contextlib.contextmanager
def _matching(source: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "match exactly" not in text:
            raise
        raise InputError(f"{source} is not of the config's model: {text[:LONGEST]}") from error


def build_model(cfg: Config) -> nn.Module:
    """The model of a configuration on the CPU, in eval mode, with random weights: nothing is loaded."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    with building(cfg.filename):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    check_parts(model)
    model.eval()
    return model


def load_model(cfg: Config, checkpoint: str, device: torch.device, *, needs_classes: bool = True) -> nn.Module:
    """The model with the weights of a checkpoint, on the device, as the frameworks' `inference_*` functions take it.

    Its `dataset_meta` has classes and palette: the checkpoint's, else those of the configuration's test data.

    Raises:
        InputError: the checkpoint is not of this model, or nothing names the classes and `needs_classes`.
    """
    path = str(check_checkpoint(checkpoint))
    model = build_model(cfg)
    with _matching(checkpoint):
        content = load_checkpoint(model, path, map_location="cpu", strict=True)
    recorded = {key.lower(): value for key, value in content.get("meta", {}).get("dataset_meta", {}).items()}
    dataset = next(data_of(cfg, "test"), None)
    if dataset is None:
        raise InputError(f"config {cfg.filename} has no test_dataloader, whose data set says the classes: add it")
    with building(cfg.filename):
        configured = DATASETS.build({**dataset, "lazy_init": True}).metainfo
    meta = {**configured, **recorded}
    if needs_classes and not meta.get("classes"):
        raise InputError(f"neither {checkpoint} nor the config names the classes: add metainfo to its test data set")
    model.dataset_meta, model.cfg = meta, cfg
    return model.to(device)


def add_prediction_arguments(parser: argparse.ArgumentParser, what: str = "picture") -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a URL")
    parser.add_argument(f"{what}s", nargs="+", metavar=what.upper(), help=f"{what}s, or folders of them")
    parser.add_argument("--out-dir", required=True, type=Path, metavar="DIR", help="to write into")
    Reading.add_argument(parser)


def open_model(args: argparse.Namespace, application: Application, *, needs_classes: bool = True) -> nn.Module:
    """The model that CONFIG and CHECKPOINT of a parsed command line name, on its device."""
    patches.apply(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    model = load_model(cfg, args.checkpoint, use_device(args.device), needs_classes=needs_classes)
    make_folder("--out-dir", args.out_dir)
    return model


def info(argv: Sequence[str] | None, application: Application) -> None:
    """Print parameters and FLOPs of a configuration's model."""
    from .complexity import measure

    axes = ("T", "H", "W")[-len(application.shape) :]
    published = " ".join(map(str, application.shape))
    parser = build_parser(application, "info", "Print parameters and FLOPs of a model and of its parts.")
    parser.add_argument(
        "--shape",
        type=whole_number(1),
        nargs=len(axes),
        default=application.shape,
        metavar=axes,
        help=f"of the input, after resizing (default {published})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    patches.import_framework(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    device = use_device(args.device)
    parts = measure(build_model(cfg).to(device), tuple(args.shape))
    if args.json:
        print(json.dumps({"config": args.config, "shape": list(args.shape), "parts": parts}, indent=2))
        return
    print(f"{args.config}, input {' x '.join(map(str, args.shape))}")
    print(f"{'part':<20}{'params (M)':>12}{'FLOPs (G)':>12}")
    for name, figures in parts.items():
        print(f"{name:<20}{figures['params'] / 1e6:>12.2f}{figures['flops'] / 1e9:>12.1f}")


def config(argv: Sequence[str] | None, application: Application) -> None:
    """Print a configuration as one whole file, or the tables of all."""
    parser = ArgumentParser(
        prog=f"python -m {application.name}.config",
        description="Print a configuration as one whole file, which the framework's own tools run, too.",
        allow_abbrev=False,
    )
    add_config_arguments(parser, application, nargs="?")
    parser.add_argument("--tables", action="store_true", help="print the README's tables of all configurations instead")
    args = parser.parse_args(argv)
    if args.tables:
        print(application.markdown(), end="")
        return
    if args.config is None:
        raise InputError(f"CONFIG is missing: give a file, or a name of {application.name}/zoo.py; --tables prints all")
    patches.import_framework(application.scope)
    cfg = open_config(args.config, args.cfg_options, application)
    name = Path(cfg.filename).stem
    if name in application.rows:
        print("\n".join(textwrap.wrap(application.follows(name), 118, initial_indent="# ", subsequent_indent="# ")))
    print(cfg.pretty_text, end="")


def write_json(path: Path, content: Any) -> None:
    """Write `content`; afterwards `path` holds all of it, or what it held before.

    Raises:
        InputError: it cannot be written.
    """
    if isinstance(content, list):  # a line each
        text = "[\n" + ",\n".join(json.dumps(item) for item in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=1, default=float) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text)
