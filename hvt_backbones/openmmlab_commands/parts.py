"""Whether the parts of a model fit together, said before the first step in which PyTorch would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hvt_backbones.errors import InputError
from hvt_backbones.openmmlab import HVTBackbone

HEADS = ("rpn_head", "bbox_head", "cls_head", "decode_head", "auxiliary_head")


def check_parts(model: nn.Module) -> None:
    """Compare the channels of our backbone's maps with what the neck or the heads take, and the neck's with the heads'.

    Parts that do not say what they take are left to PyTorch.

    Raises:
        InputError: they differ.
    """
    model = getattr(model, "module", model)  # of test-time augmentation
    backbone, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if not isinstance(backbone, HVTBackbone):
        return
    given, giver = backbone.channels, f"the backbone {backbone.name}"
    cause = "set it to these, or change model.backbone.out_indices"
    if neck is not None:
        _compare("neck", getattr(neck, "in_channels", None), given, giver, cause)
        count, channels = getattr(neck, "num_outs", None), getattr(neck, "out_channels", None)
        if not isinstance(count, int) or not isinstance(channels, int):
            return
        given, giver, cause = (channels,) * count, "the neck", "set it to these, or change model.neck.out_channels"
    for name, head in _heads(model):
        maps, of = given, giver
        if isinstance(index := getattr(head, "in_index", None), int | Sequence):
            chosen = [index] if isinstance(index, int) else list(index)
            if any(not -len(given) <= number < len(given) for number in chosen):
                raise InputError(
                    f"model.{name}.in_index is {index}, {giver} gives {len(given)} maps, 0 to {len(given) - 1}: choose "
                    "among these"
                )
            maps, of = tuple(given[number] for number in chosen), f"{giver}, of which it takes {index},"
            if head.input_transform == "resize_concat":
                maps = (sum(maps),)
        _compare(name, getattr(head, "in_channels", None), maps, of, cause)


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The heads of a detector, recognizer or segmentor, which has lists of them in cascades."""
    for name in HEADS:
        part = getattr(model, name, None)
        if isinstance(part, nn.ModuleList):
            yield from ((f"{name}[{index}]", head) for index, head in enumerate(part))
        elif part is not None:
            yield name, part


def _compare(name: str, wanted: Any, given: tuple[int, ...], giver: str, cause: str) -> None:
    """One number stands for every map."""
    if wanted is None or (tuple(wanted) == given if isinstance(wanted, Sequence) else {wanted} == set(given)):
        return
    channels = ", ".join(map(str, given))
    raise InputError(f"model.{name}.in_channels is {wanted}, {giver} gives maps of {channels} channels: {cause}")
