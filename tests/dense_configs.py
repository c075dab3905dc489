"""What the tests of the configurations share: the tables of the READMEs, and counts without computing anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hvt_backbones.variants import find_variant
from runner.application import ROOT, Application, Row
from runner.parts import complete

SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
# in the name of a configuration -> the model that it names
BACKBONES = {
    **{f"swin-{letter}-p4-w7": f"swin_{SIZES[letter]}" for letter in "tsb"},
    **{f"swinv2-{letter}-w8": f"swinv2_{SIZES[letter]}_window8" for letter in "tsb"},
    **{f"pvtv2-{size.replace('_', '-')}": f"pvt_v2_{size}" for size in ("b0", "b1", "b2", "b2_li", "b3", "b4", "b5")},
    **{f"twins-{kind}-{letter}": f"twins_{kind}_{SIZES[letter]}" for kind in ("pcpvt", "svt") for letter in "sbl"},
}
# one of each kind, and arguments that make it small enough to train in a test
PYRAMID = {"embed_dims": (16, 24, 32, 40), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
WINDOWED = {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4)}
SMALL = {
    "swin-t-p4-w7": WINDOWED,
    "swinv2-t-w8": WINDOWED,
    "pvtv2-b2-li": PYRAMID,
    "twins-pcpvt-s": PYRAMID,
    "twins-svt-s": {**PYRAMID, "depths": (2, 2, 1, 1)},
}
TOLERANCE = 0.02
SHRINK = 8  # of all lengths in pixels
LENGTHS = ("scale", "scales", "crop_size", "size", "stride")
NUMBER = r"\d+(?:\.\d+)?"
PUBLISHED = re.compile(rf"({NUMBER})(?: at (\d+)x(\d+))?((?:, [a-z])*)")


@dataclass(frozen=True)
class Published:
    """A number in a table: of which image (height, width), and marks that say how its source counts otherwise."""

    value: float
    shape: tuple[int, int] | None
    marks: frozenset[str]


@dataclass(frozen=True)
class Flops:
    """Multiply-adds: all of them, those of the products of attention, and what counting padded windows would add."""

    total: int
    attention: int = 0
    padding: int = 0

    def as_source_counts(self, marks: frozenset[str]) -> int:
        return self.total - ("a" in marks) * self.attention + ("p" in marks) * self.padding


def shrink(node: Any) -> None:
    """Divide the lengths in pixels of pipelines and of a model's settings, in place."""
    if isinstance(node, list | tuple):
        for item in node:
            shrink(item)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in LENGTHS and isinstance(value, list | tuple):
            node[key] = _divided(value)
        else:
            shrink(value)


def narrow(node: Any) -> None:
    """Make the widths of necks and heads, and the numbers of proposals, 32: whole numbers from 256 on, in place."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(value, list | dict):
            narrow(value)
        elif isinstance(value, int) and value >= 256:
            node[key] = 32


def _divided(value: Any) -> Any:
    return type(value)(map(_divided, value)) if isinstance(value, list | tuple) else value // SHRINK


def small_config(name: str, application: Application, arguments: Mapping[str, Any], work_dir: Path) -> Config:
    """A configuration with another backbone, small pictures, nothing downloaded or saved, one step of training."""
    cfg = application.config(name)
    backbone = {**cfg.model.backbone, **arguments, "pretrained": False}
    shrink(cfg.model)
    narrow(cfg.model)
    cfg.model.backbone = backbone
    for part in ("train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[part].update(num_workers=0, persistent_workers=False)
        shrink(cfg[part].dataset.pipeline)
    cfg.train_dataloader.batch_size = 2
    cfg.default_hooks.checkpoint = None
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = work_dir.name
    return cfg


def train_and_evaluate(cfg: Config) -> dict[str, float]:
    """One step, which must reach every parameter, as distributed training asks; then the metrics."""
    complete(cfg)
    runner = Runner.from_cfg(cfg)
    reached = set()
    for name, parameter in runner.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
    runner.train()
    assert not {name for name, _ in runner.model.named_parameters()} - reached
    check_decay(runner)
    return runner.val()


def check_decay(runner: Runner) -> None:
    """Every parameter has the optimiser's learning rate and weight decay, times what the configuration's keys say."""
    settings = runner.cfg.optim_wrapper
    rules = settings.get("paramwise_cfg", {})
    rules = rules.get("custom_keys", rules)
    groups = {id(p): group for group in runner.optim_wrapper.optimizer.param_groups for p in group["params"]}
    found = dict.fromkeys(rules, 0)
    for name, parameter in runner.model.named_parameters():
        keys = [key for key in rules if key in name]
        for key in keys:
            found[key] += 1
        group, optimizer = groups[id(parameter)], settings.optimizer
        decay = math.prod([optimizer.weight_decay, *(rules[key].get("decay_mult", 1.0) for key in keys)])
        lr = math.prod([optimizer.lr, *(rules[key].get("lr_mult", 1.0) for key in keys)])
        assert (group["weight_decay"], group["initial_lr"]) == (decay, pytest.approx(lr)), name
    if rules:
        assert found["norm"]
        positions = sum(count for key, count in found.items() if "position" in key)
        assert positions or runner.cfg.model.backbone.name.startswith("pvt")


def _published(cell: str) -> Published | None:
    if cell == "-":
        return None
    value, height, width, marks = PUBLISHED.fullmatch(cell).groups()
    shape = (int(height), int(width)) if height else None
    return Published(float(value), shape, frozenset(re.findall("[a-z]", marks)))


def readme_is_current(application: Application) -> bool:
    """Whether the tables of its README are those of the zoo."""
    readme = (ROOT / application.name / "README.md").read_text()
    return all(table in readme for table in application.markdown().rstrip().split("\n\n### "))


def build(cfg: Config) -> nn.Module:
    """The model of a configuration at full size, without memory for its parameters."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        return MODELS.build(cfg.model).eval()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def count(module: Any, *inputs: Any) -> tuple[Any, Flops]:
    """The outputs, and the multiply-adds of convolutions and matrix products; attention has the batched ones."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = module(*inputs)
    batched = counter.get_flop_counts().get("Global", {}).get(torch.ops.aten.bmm, 0)
    return outputs, Flops(counter.get_total_flops() // 2, batched // 2)


_backbones: dict[Any, tuple[Any, Flops]] = {}


def count_backbone(backbone: nn.Module, shape: tuple[int, int]) -> tuple[Any, Flops]:
    """`count`, once for each variant and shape: it is the slow part."""
    key = backbone.name, tuple(backbone.channels), shape
    if key not in _backbones:
        maps, flops = count(backbone, torch.empty(1, 3, *shape, device="meta"))
        _backbones[key] = maps, Flops(flops.total, flops.attention, _padding(backbone.name, shape))
    return _backbones[key]


@cache
def _padding(name: str, shape: tuple[int, int]) -> int:
    """Multiply-adds of Swin's qkv and output projections on what pads its maps to whole windows, in all stages."""
    variant = find_variant(name)[0]
    if variant.family != "swin":
        return 0
    extra = 0
    for stage, depth in enumerate(variant.arch["depths"]):
        window, channels = variant.arch["window_size"], variant.arch["embed_dim"] * 2**stage
        sides = [-(-side // (4 * 2**stage)) for side in shape]
        padded = [-(-side // window) * window for side in sides]
        extra += depth * 4 * channels**2 * (padded[0] * padded[1] - sides[0] * sides[1])
    return extra


def published_shape(row: Row) -> tuple[int, int] | None:
    """For which FLOPs are published, if it is another one."""
    published = _published(row.counts.split("; ")[3])
    return None if published is None else published.shape


def check_figures(
    row: Row, parameter_count: int, flops: Mapping[tuple[int, int], Flops], shape: tuple[int, int]
) -> None:
    """The row says what was counted, which is within 2 % of what is published, counted as the source counts.

    Args:
        flops: of `shape`, in which the README prints it, and of the shape for which it is published.
    """
    params, published_params, giga, published_flops = row.counts.split("; ")
    counted = f"{parameter_count / 1e6:.1f}", f"{flops[shape].total / 1e9:.0f}"
    assert (params, giga) == counted, f"the row has {params} and {giga}, counted are {counted}"
    counted = parameter_count / 1e6
    if (published := _published(published_params)) is not None:
        near = counted == pytest.approx(published.value, rel=TOLERANCE)
        assert near != ("x" in published.marks), f"{counted:.1f} M parameters"
    if (published := _published(published_flops)) is not None:
        counted = flops[published.shape or shape].as_source_counts(published.marks) / 1e9
        near = counted == pytest.approx(published.value, rel=TOLERANCE)
        assert near != ("x" in published.marks), f"{counted:.1f} GFLOPs"
