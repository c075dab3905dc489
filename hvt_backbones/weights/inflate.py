"""From images to video: weights of a 2-D Swin as a Video Swin starts from them (arXiv:2106.13230, Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..backbone import check_arguments
from ..errors import WeightsError
from ..swin import Window, windows_per_stage
from .convert import Checkpoint, read_checkpoint
from .keymap import template
from .layouts import find_layout
from .resize import resize_position_table, square_window
from .sources import Source, read_source

PATCH_PROJECTION = "stages.0.downsample.proj.weight"
TABLE = template("stages.{s}.blocks.{b}.attn.position_bias.table")


def inflate(
    source: Source,
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
    checkpoint = read_checkpoint(read_source(source).tensors, layout)
    if checkpoint.layout.family != "swin":
        raise WeightsError(f"only 2-D Swin is inflated to video, the weights are of {checkpoint.layout.family}")
    windows = windows_per_stage(window_size, checkpoint.stages, 3)
    return inflate_checkpoint(checkpoint, windows, patch_frames).tensors


def inflate_checkpoint(checkpoint: Checkpoint, windows: Sequence[Sequence[int]], patch_frames: int = 2) -> Checkpoint:
    """A checkpoint of a 2-D Swin as one of a Video Swin, with windows (frames, height, width) in each stage."""
    tensors, inflated = {}, {}
    heads = [key for key in checkpoint.tensors if key.startswith("head.")]
    for key, tensor in checkpoint.tensors.items():
        if key in heads:
            continue
        if key == "absolute_pos_embed":
            raise WeightsError("the weights have an absolute position embedding, which Video Swin has not")
        if key == PATCH_PROJECTION:
            tensor = tensor[:, :, None].expand(-1, -1, patch_frames, -1, -1) / patch_frames
            inflated[key] = f"to {patch_frames} frames"
        elif (values := TABLE.match(key)) and values["s"] < len(windows):
            frames, *side = windows[values["s"]]
            old = square_window(len(tensor))
            if old is None:
                raise WeightsError(f"{key} has {len(tensor)} rows, of no square window: it cannot be inflated")
            if old != tuple(side):
                tensor = resize_position_table(tensor, old, side)
            tensor = tensor.repeat(2 * frames - 1, 1)
            inflated[key] = f"window {'x'.join(map(str, old))} to {'x'.join(map(str, (frames, *side)))}"
        tensors[key] = tensor
    theirs = [key for head in heads for key in checkpoint.sources[head]]
    return replace(
        checkpoint,
        layout=find_layout("hvt", "video_swin"),
        wrapper="",
        style="dense",
        given=tensors,
        tensors=tensors,
        sources={key: checkpoint.sources[key] for key in tensors},
        dropped=checkpoint.dropped | dict.fromkeys(theirs, "a head for images"),
        inflated=inflated,
    )
