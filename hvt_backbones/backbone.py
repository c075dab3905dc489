"""What every family promises: maps of any image size, finest first, and the same handles for training."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from .errors import InputError
from .layers.block import Block, recompute
from .layers.maps import channels_first, channels_last

# Parameters that say where a token is, or how sharply it looks: weight decay would pull them to zero for no reason
# (`no_weight_decay` of the official codes of Swin, SwinV2 and Twins).
NO_DECAY_NAMES = ("absolute_pos_embed", "position_bias", "logit_scale", "position")


def is_spared(name: str) -> bool:
    """Whether a parameter of this name gets no weight decay, however many axes it has."""
    return any(word in name.split(".") for word in NO_DECAY_NAMES)


def is_whole(value: Any, least: int = 1) -> bool:
    """Whether `value` is an integer, NumPy's included, of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


# kind of an argument -> what fits, and how to say it
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "counts": (is_whole, "a positive integer"),
    "rates": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "factors": (lambda value: _is_number(value) and value > 0, "a positive number"),
    "flags": (lambda value: isinstance(value, bool), "True or False"),
}
KINDS_PER_STAGE = {
    **dict.fromkeys(("depths", "embed_dims", "num_heads", "sr_ratios"), "counts"),
    "mlp_ratios": "factors",
}


def check_arguments(**kinds: Mapping[str, Any]) -> None:
    """Raise InputError where an argument is not of its kind: `counts={"in_chans": in_chans}`, see `KINDS`."""
    for kind, arguments in kinds.items():
        fits, words = KINDS[kind]
        for name, value in arguments.items():
            if not fits(value):
                raise InputError(f"{name} is {value!r}: give {words}")


def check_stages(out_indices: Sequence[int], **per_stage: Sequence[Any]) -> None:
    """Raise InputError where arguments that have one entry per stage have not, or an output does not exist."""
    for name, values in per_stage.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            example = f", such as ({', '.join([repr(values)] * 4)}) for four" if isinstance(values, Real) else ""
            raise InputError(f"{name} is {values!r}: give one entry per stage{example}")
        if name in KINDS_PER_STAGE:
            check_arguments(**{KINDS_PER_STAGE[name]: {f"{name}[{i}]": value for i, value in enumerate(values)}})
    lengths = {name: len(values) for name, values in per_stage.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"one entry per stage is needed, got {', '.join(f'{n} of {k}' for k, n in lengths.items())}")
    stages = next(iter(lengths.values()))
    whole = isinstance(out_indices, Sequence) and all(is_whole(index, 0) for index in out_indices)
    indices = list(out_indices) if whole else []
    if not indices or sorted(set(indices)) != indices or indices[-1] >= stages:
        raise InputError(
            f"out_indices is {out_indices!r}: give ascending stage numbers from 0 to {stages - 1}, in a tuple"
        )


def sides(size: int | Sequence[Any], axes: int, name: str, least: int = 1) -> tuple[int, ...]:
    """Read a size: one side for all axes, or one per axis."""
    given = size if isinstance(size, Sequence) and not isinstance(size, str) else (size,) * axes
    if len(given) != axes or not all(is_whole(side, least) for side in given):
        raise InputError(f"{name} is {size!r}: give an integer of at least {least}, or {axes} of them")
    return tuple(map(int, given))


def check_heads(dims: Sequence[int], num_heads: Sequence[int]) -> None:
    """Raise InputError where a stage's heads do not divide its channels."""
    for i, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
        if dim % heads:
            raise InputError(f"stage {i} has {dim} channels, which {heads} heads do not divide")


def keywords(function: Callable[..., Any]) -> set[str]:
    """Names of its keyword-only arguments."""
    return {name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}


class Layered(nn.Module):
    """A module whose parameters lie in layers, the first one nearest to the image, for optimisers; and in timm's words.

    What timm's `create_optimizer_v2` asks of a model gives the groups of `param_groups`.
    """

    def layer_ids(self) -> Iterator[tuple[str, int]]:
        """(parameter name, layer) of all parameters."""
        raise NotImplementedError

    def param_groups(
        self, *, lr: float | None = None, weight_decay: float = 0.05, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: layer-wise learning-rate decay, and no decay where it does harm.

        Norms, biases, position tables (with SwinV2's position network) and `logit_scale` get weight decay 0; what is
        frozen is left out.

        Args:
            lr: base learning rate; each group then carries its own `lr`. Without it only `lr_scale` (timm's word).
            weight_decay: for all other parameters.
            layer_decay: factor from one block to the one before it (BEiT, arXiv:2106.08254, App. C); 1 is none.

        Returns:
            Dictionaries with `params`, `name`, `weight_decay`, `lr_scale` and, if given, `lr`.
        """
        layer_ids = dict(self.layer_ids())
        last = max(layer_ids.values())
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            decays = parameter.dim() > 1 and not is_spared(name)
            layer = layer_ids[name]
            scale = layer_decay ** (last - layer)
            key = (layer if layer_decay != 1.0 else last, decays)
            if key not in groups:
                groups[key] = {
                    "name": f"layer {key[0]} {'decay' if decays else 'no decay'}"
                    if layer_decay != 1.0
                    else ("decay" if decays else "no decay"),
                    "params": [],
                    "weight_decay": weight_decay if decays else 0.0,
                    "lr_scale": scale,
                    **({} if lr is None else {"lr": lr * scale}),
                }
            groups[key]["params"].append(parameter)
        return list(groups.values())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that do not decay although they may have more than one axis."""
        return {name for name, _ in self.named_parameters() if is_spared(name)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A function from a parameter's name to its layer, or with `coarse` to one number for each stage."""
        layers = dict(self.layer_ids())
        if coarse:
            stages = {name: re.search(r"stages\.(\d+)\.", name) for name in layers}
            layers |= {name: 1 + int(stage[1]) for name, stage in stages.items() if stage and layers[name]}
        return layers.__getitem__


class Stage(nn.Module):
    """One resolution: `downsample` into it, `blocks` at it, `norm` of what leaves it.

    Between the first two, `embed` may change the map; the last may be for the output alone, so that both are given:
    the map before and after it. Shape: (B, *spatial, C') -> twice (B, *spatial, C).

    Args:
        norm_is_of_next: `norm` is of the map that enters the blocks of the next stage, and not called here.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: Iterable[nn.Module],
        norm: nn.Module | None = None,
        *,
        norm_is_of_next: bool = False,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.norm_is_of_next = norm_is_of_next
        self.blocks: Sequence[nn.Module] = nn.ModuleList(blocks)  # type: ignore[assignment] # no Sequence to its type
        self.norm = nn.Identity() if norm is None else norm
        self.recomputed: str | None = None  # "block" or "stage", by `Backbone.set_grad_checkpointing`

    def forward(self, x: Tensor, embed: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        x = self.downsample(x)
        if embed is not None:
            x = embed(x)
        x = recompute(self._attend)(x) if self.training and self.recomputed == "stage" else self._attend(x)
        return x, x if self.norm_is_of_next else self.norm(x)

    def _attend(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = recompute(block)(x) if self.training and self.recomputed == "block" else block(x)
        return x


class Backbone(Layered):
    """A hierarchical backbone: images (or clips) of any size in, one map per entry of `out_indices` out, finest first.

    A family builds its `stages` (only those up to the last output) and hands them over with the facts below;
    freezing, layer-wise decay, activation checkpointing and feature extraction are written here, once.

    Attributes:
        channels: channels of each returned map.
        strides: input pixels per cell of each returned map; video families keep the frames per cell in `patch_size[0]`.
        num_features: channels of the last map.
        out_indices: which stages are returned.
        stage_channels, stage_strides: of every stage, also of those that are not returned or not built.
    """

    family: ClassVar[str]
    # Of a map: 2, or 3 with time first.
    axes: ClassVar[int] = 2
    # Whether a stage's norm also feeds the next stage (PVTv2, Twins) or only its output (Swin).
    norm_feeds_next_stage: ClassVar[bool] = True

    def __init__(
        self,
        stages: Iterable[Stage],
        *,
        in_chans: int,
        channels: Sequence[int],
        strides: Sequence[int],
        out_indices: Sequence[int],
        out_after_downsample: bool = False,
    ) -> None:
        super().__init__()
        self.stages: Sequence[Stage] = nn.ModuleList(stages)  # type: ignore[assignment] # whose type names no modules
        self.in_chans = in_chans
        self.out_indices = tuple(out_indices)
        places = [min(i + out_after_downsample, len(channels) - 1) for i in self.out_indices]
        self.channels = tuple(channels[i] for i in places)
        self.strides = tuple(strides[i] for i in places)
        self.num_features = self.channels[-1]
        self.frozen_stages = 0
        self.stage_channels, self.stage_strides = tuple(channels), tuple(strides)

    @classmethod
    def arguments(cls) -> set[str]:
        """Names of the constructor's arguments, those included that it hands on to a class above."""
        above = cls.__mro__[: cls.__mro__.index(Backbone)]
        return set().union(*(keywords(vars(base)["__init__"]) for base in above if "__init__" in vars(base)))

    @classmethod
    def classifier_arguments(cls, stages: int) -> dict[str, Any]:
        """Constructor arguments by which the official classifier of `stages` stages differs from the dense code."""
        return {}

    def embed(self, x: Tensor) -> Tensor:
        """Between the patch embedding and the first block, (B, *grid, C) -> the same: position embedding, dropout."""
        return x

    def forward(
        self,
        images: Tensor,
        embed: Callable[[Tensor], Tensor] | None = None,  # none by keyword alone: ONNX's TorchScript exporter gives all
        handed_on: list[Tensor] | None = None,
        stop: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Feature maps of the stages in `out_indices`.

        Args:
            images: (B, C, H, W); video families (B, C, T, H, W). Any size from one patch upward.
            embed: in the place of `self.embed`: masked pre-training hides patches there.
            handed_on: a list to which each stage's map is added as the next stage takes it: before a norm that is of
                the output alone, after one that feeds the next stage.
            stop: the first stage that is left out, with all after it.

        Returns:
            (B, C_i, H_i, W_i) each, finest first. They are views of channels-last memory.

        Raises:
            InputError: the rank, the channel count or the size does not fit.
        """
        self._check(images)
        x = channels_last(images)
        maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i == stop:
                break
            x, normed = stage(x, (embed or self.embed) if i == 0 else self._returning(self.stages[i - 1], maps))
            if i in self.out_indices and not stage.norm_is_of_next:
                maps.append(channels_first(normed))
            if self.norm_feeds_next_stage:
                x = normed
            if handed_on is not None:
                handed_on.append(channels_first(x))
        return tuple(maps)

    def _returning(self, before: Stage, maps: list[Tensor]) -> Callable[[Tensor], Tensor] | None:
        """What a stage does with the map that enters its blocks, where that is the output of the stage before it."""

        def append(x: Tensor) -> Tensor:
            maps.append(channels_first(before.norm(x)))
            return x

        return append if before.norm_is_of_next else None

    def _check(self, images: Tensor) -> None:
        if isinstance(images, fx.Proxy):
            raise InputError(
                "torch.fx.symbolic_trace, and torchvision's create_feature_extractor, cannot follow a model that takes "
                "images of any size. Use create_backbone(name, out_indices=...) for the maps of stages, forward hooks "
                "for those in between, torch.export.export(model, (images,)) for a graph"
            )
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"images must be a floating-point tensor, normed as in training, not {kind}")
        what, shape = ("images", "(B, C, H, W)") if self.axes == 2 else ("clips", "(B, C, T, H, W)")
        if images.dim() != 2 + self.axes:
            raise InputError(f"expected {what} of shape {shape}, got {tuple(images.shape)}")
        if images.shape[1] != self.in_chans:
            raise InputError(
                f"the {what} have {images.shape[1]} channels, the model takes {self.in_chans}: "
                f"convert the {what}, or build the model with in_chans={images.shape[1]}"
            )
        if 0 in images.shape[2:]:
            raise InputError(f"the {what} have the shape {tuple(images.shape)}: there is nothing in them")
        patch = self.stage_strides[0]
        if min(images.shape[-2:]) < patch:
            raise InputError(
                f"the {what[:-1]} is {images.shape[-2]}x{images.shape[-1]}, smaller than one "
                f"{patch}x{patch} patch: enlarge it"
            )

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for stage in self.stages[: self.frozen_stages]:
            stage.eval()
        return self

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        """Recompute activations in the backward pass: less memory, at most about a third more time.

        Args:
            enable: what is recomputed as one: a "block" (True), a "stage", or of each block the "attention" or the
                "mlp" alone, which keeps more and recomputes less; False for nothing.

        Raises:
            InputError: another word, or a branch of blocks that are no `Block`.
        """
        chosen = "block" if enable is True else enable or None
        if chosen not in (None, "block", "stage", "attention", "mlp"):
            raise InputError(f"grad checkpointing is {enable!r}: give True, False, block, stage, attention or mlp")
        branch = chosen if chosen in ("attention", "mlp") else None
        blocks = [block for stage in self.stages for block in stage.blocks]
        if branch and not all(isinstance(block, Block) for block in blocks):
            raise InputError(f"grad checkpointing is {enable!r}, which {self.family} has not: give block or stage")
        for stage in self.stages:
            stage.recomputed = None if branch else chosen
        for block in blocks:
            if isinstance(block, Block):
                block.recomputed = branch

    def set_sequential_attention(self, max_logits: int | None) -> None:
        """Attend part by part, so that large windows and global attention fit into memory, forward and backward.

        The sequential self-attention of SwinV2 (arXiv:2111.09883, Sec. 3.5), in all families: windows, heads and, where
        one window has too many, queries are attended in turn, and once more in the backward pass. The maps and their
        gradients stay the same but for rounding. No tensor of logits, attention weights, position bias, mask or
        gradients of these has more numbers than `max_logits`, and at most six of that size are alive at a time. An
        attention with fewer logits is not cut. As with checkpointing, `torch.func` cannot differentiate through it.

        Args:
            max_logits: of images x windows x heads x queries x keys, such as 2**26, which are 256 MiB of float32; the
                keys of one query are the least. None: all at once.

        Raises:
            InputError: it is no positive whole number.
        """
        if max_logits is not None and not is_whole(max_logits):
            raise InputError(f"max_logits is {max_logits!r}: give a positive whole number, such as 2**26, or None")
        attentions: list[Any] = [module for module in self.modules() if hasattr(module, "max_logits")]
        for attention in attentions:
            attention.max_logits = max_logits

    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages: no gradients, and eval mode (no stochastic depth) also during training.

        Stage 0 includes the patch embedding and the absolute position embedding. 0 thaws everything.
        """
        if not is_whole(count, 0) or count > len(self.stages):
            raise InputError(f"cannot freeze {count} stages: the model has {len(self.stages)}")
        self.frozen_stages = count = int(count)
        for name, parameter in self.named_parameters():
            stage = int(name.split(".")[1]) if name.startswith("stages.") else 0
            parameter.requires_grad_(stage >= count)
        self.train(self.training)

    def layer_ids(self) -> Iterator[tuple[str, int]]:
        """(parameter name, layer) from 0 (patch and position embedding) to the number of blocks.

        A downsampling layer counts with the block after it, where there is one, a stage's norm with the one before it.
        """
        first_block = [1]
        for stage in self.stages:
            first_block.append(first_block[-1] + len(stage.blocks))
        for name, _ in self.named_parameters():
            if not name.startswith("stages."):
                yield name, 0
                continue
            _, number, part, *rest = name.split(".")
            i = int(number)
            if part == "blocks":
                yield name, first_block[i] + int(rest[0])
            elif part == "downsample":
                yield name, 0 if i == 0 else min(first_block[i], first_block[-1] - 1)
            else:
                yield name, first_block[i + 1] - 1
