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


def windows_of_training(arch: Mapping[str, Any], input_size: Sequence[int]) -> PositionWindows:
    """By which a SwinV2 with these constructor arguments divides offsets, trained on images of this size.

    A window that is larger than the map is the map's, as in the official classifier, unless `small_map` is "pad".

    Args:
        arch: constructor arguments, with `depths`.
        input_size: (height, width) in pixels.

    Raises:
        InputError: a window or a size that is none.
    """
    stages, name = len(arch["depths"]), "pretrained_window_size"
    windows = windows_per_stage(arch.get("window_size", 8), stages, 2)
    earlier = windows_per_stage(arch.get(name, 0), stages, 2, name=name, least=0)
    if arch.get("small_map") != "pad":
        tokens = zip(sides(input_size, 2, "input_size"), sides(arch.get("patch_size", 4), 2, "patch_size"), strict=True)
        shortest = min(-(-length // side) for length, side in tokens)
        maps = [-(-shortest // 2**stage) for stage in range(stages)]
        windows = [tuple(min(side, most) for side in window) for window, most in zip(windows, maps, strict=True)]
    return [
        tuple(old or new for old, new in zip(before, window, strict=True))
        for before, window in zip(earlier, windows, strict=True)
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
