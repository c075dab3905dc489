"""From images to video: weights of a 2-D Swin as a Video Swin starts from them (arXiv:2106.13230, Sec. 3.4)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..backbone import check_arguments
from ..errors import WeightsError
from ..swin import Window, windows_per_stage
from .convert import Checkpoint, find_tensors, read_checkpoint
from .resize import resize_position_table, square_window
from .rules import template

PATCH_PROJECTION = "stages.0.downsample.proj.weight"
TABLE = template("stages.{s}.blocks.{b}.attn.position_bias.table")


def inflate(
    source: Mapping[str, Any] | str | os.PathLike,
    *,
    window_size: Window | Sequence[Window] = (8, 7, 7),
    patch_frames: int = 2,
    layout: str = "auto",
) -> dict[str, Tensor]:
    """Weights of a 2-D Swin, of any layout, as those of a Video Swin; the classification head is left out.

    The patch embedding is repeated over the frames of a tube and divided by their number; each table of position
    biases is resized bicubically to the window's height and width and repeated for every offset in time. So a clip of
    one repeated frame is embedded as that frame was. `load_weights` does the same when a video model is given such
    weights.

    Args:
        source: a state dict, a path, a URL or "hf-hub:org/name", as `load_weights` takes it.
        window_size: of the video model, (frames, height, width) in tokens, or one of these per stage.
        patch_frames: frames of a tube.
        layout: of `source`; recognised by the keys by default.

    Returns:
        The state dict of a `VideoSwinTransformer`, in this library's names.

    Raises:
        InputError: `patch_frames` or `window_size` is no positive integer, or not one per axis.
        WeightsError: the weights cannot be read, are not of a 2-D Swin, or their windows are not square.
    """
    check_arguments(counts={"patch_frames": patch_frames})
    from .fetch import read_source

    tensors = find_tensors(source) if isinstance(source, Mapping) else read_source(source).tensors
    checkpoint = read_checkpoint(tensors, layout)
    if checkpoint.layout.family != "swin":
        raise WeightsError(f"only 2-D Swin is inflated to video, the weights are of {checkpoint.layout.family}")
    inflate_checkpoint(checkpoint, windows_per_stage(window_size, checkpoint.stages, 3), patch_frames)
    return checkpoint.tensors


def inflate_checkpoint(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], patch_frames: int) -> dict[str, str]:
    """Inflate a checkpoint of a 2-D Swin in place, to windows (frames, height, width) of each stage.

    Returns:
        Our key of what changed -> how.
    """
    inflated = {}
    for key, tensor in list(checkpoint.tensors.items()):
        if key.startswith("head."):
            del checkpoint.tensors[key]
            checkpoint.dropped |= dict.fromkeys(checkpoint.sources.pop(key), "a head for images")
        elif key == "absolute_pos_embed":
            raise WeightsError("the weights have an absolute position embedding, which Video Swin has not")
        elif key == PATCH_PROJECTION:
            frames = tensor[:, :, None].expand(-1, -1, patch_frames, -1, -1)
            checkpoint.tensors[key] = frames / patch_frames
            inflated[key] = f"to {patch_frames} frames"
        elif (values := TABLE.match(key)) and values["s"] < len(windows):
            frames, *side = windows[values["s"]]
            old = square_window(len(tensor))
            if old is None:
                raise WeightsError(f"{key} has {len(tensor)} rows, of no square window: it cannot be inflated")
            if old != tuple(side):
                tensor = resize_position_table(tensor, old, side)
            checkpoint.tensors[key] = tensor.repeat(2 * frames - 1, 1)
            inflated[key] = f"window {'x'.join(map(str, old))} to {'x'.join(map(str, (frames, *side)))}"
    return inflated
