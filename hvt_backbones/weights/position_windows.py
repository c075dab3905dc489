"""The windows for which a SwinV2 learned its position biases (arXiv:2111.09883, Sec. 3.3).

Its network sees offsets divided by the window of training. In another window they must be divided by that one still,
`pretrained_window_size`, also after a fine-tuning in between: each offset keeps the bias that was learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backbone import Backbone, sides
from ..errors import WeightsError
from ..swin import SwinTransformerV2, windows_per_stage
from .report import shown_windows

PositionWindows = Sequence[tuple[int, ...]]  # (height, width) of each stage


def windows_at(arch: Mapping[str, Any], input_size: Sequence[int]) -> PositionWindows:
    """Of a Swin or SwinV2 with these constructor arguments, `depths` and `window_size` among them.

    A window that is larger than the map is the map's, as in the official classifier, unless `small_map` is "pad".

    Args:
        arch: the constructor arguments.
        input_size: (height, width) of the images in pixels.

    Raises:
        InputError: a window or a size that is none.
    """
    windows = windows_per_stage(arch["window_size"], len(arch["depths"]), 2)
    if arch.get("small_map") == "pad":
        return windows
    maps = maps_at(arch, input_size)
    return [tuple(min(side, *shape) for side in window) for window, shape in zip(windows, maps, strict=True)]


def maps_at(arch: Mapping[str, Any], input_size: Sequence[int]) -> list[tuple[int, ...]]:
    """(height, width) in tokens of each stage, of the model of `windows_at`."""
    tokens = zip(sides(input_size, 2, "input_size"), sides(arch.get("patch_size", 4), 2, "patch_size"), strict=True)
    first = [-(-length // patch) for length, patch in tokens]
    return [tuple(-(-length // 2**stage) for length in first) for stage in range(len(arch["depths"]))]


def windows_of_training(arch: Mapping[str, Any], input_size: Sequence[int]) -> PositionWindows:
    """By which a SwinV2 divides offsets that is trained with these arguments on these images, see `windows_at`."""
    name = "pretrained_window_size"
    earlier = windows_per_stage(arch.get(name, 0), len(arch["depths"]), 2, name=name, least=0)
    return [
        tuple(old or new for old, new in zip(before, window, strict=True))
        for before, window in zip(earlier, windows_at(arch, input_size), strict=True)
    ]


def fitting_windows(backbone: Backbone, trained: PositionWindows | None) -> PositionWindows | None:
    """The `pretrained_window_size` with which `backbone` gives each offset the bias that the weights learned for it.

    Where it says none, it is the weights', unless that is its own window; None where there is nothing to change.

    Raises:
        WeightsError: it says another.
    """
    if trained is None or not isinstance(backbone, SwinTransformerV2):
        return None
    given, own = backbone.pretrained_window_size, backbone.window_size
    learned = trained[: len(own)]  # the backbone may end earlier
    for stage, (said, window) in enumerate(zip(given, learned, strict=True)):
        if any(said) and said != window:
            raise WeightsError(
                f"the model has pretrained_window_size {shown_windows([said])} in stage {stage}, the weights learned "
                f"their position biases with {shown_windows([window])}: build it with pretrained_window_size="
                f"{shown_windows(trained)}"
            )
    fitting = [said if window == new else new for said, window, new in zip(given, own, learned, strict=True)]
    return None if fitting == list(given) else fitting
