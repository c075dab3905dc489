"""What the `hvt.*` text beside weights says of their model; `model_file.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..variants import find_variant
from .position_windows import PositionWindows, windows_of_training

PREFIX = "hvt."


def recorded_value(source: object, metadata: Mapping[str, str], name: str, kind: type | tuple[type, ...]) -> Any:
    """A JSON value among the text beside the weights; None where there is none.

    Raises:
        WeightsError: the text is no JSON, or a value of another kind.
    """
    if PREFIX + name not in metadata:
        return None
    text = metadata[PREFIX + name]
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, kind):
        raise WeightsError(f"{source}: its entry {PREFIX}{name} is {text!r}, not the JSON that the trainer writes")
    return value


def recorded_arguments(source: str | Path, metadata: Mapping[str, str], *, named: bool) -> dict[str, Any]:
    """The constructor arguments that the text beside weights tells; if `named`, also those of the model it names."""
    arch = recorded_value(source, metadata, "overrides", dict) or {}
    if named and (name := metadata.get(PREFIX + "model")) is not None:
        arch = find_variant(name)[0].with_overrides(arch)
    return arch


def recorded_position_windows(source: object, metadata: Mapping[str, str]) -> PositionWindows | None:
    """The windows for which a SwinV2 learned its position biases; None where the text names no SwinV2.

    Raises:
        InputError: the text names an unknown model, or windows that are none.
    """
    name = metadata.get(PREFIX + "model")
    if name is None or (variant := find_variant(name)[0]).family != "swinv2":
        return None
    arch = variant.with_overrides(recorded_value(source, metadata, "overrides", dict) or {})
    size = recorded_value(source, metadata, "input_size", list)
    return windows_of_training(arch, size[-2:] if size else (variant.input_size,) * 2)
