"""Maps: channels last inside a model, channels first for convolutions and for what leaves it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops.windows import at_least, pad_to


def channels_first(x: Tensor) -> Tensor:
    """(B, *spatial, C) -> (B, C, *spatial), a view: of a contiguous map in the channels-last memory format."""
    # `movedim` from a negative axis becomes an invalid Transpose in the TorchScript exporter of ONNX
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1))


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, *spatial, C), a view."""
    return x.permute(0, *range(2, x.dim()), 1)


def convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution of a channels-last map: (B, *spatial, C) -> (B, *spatial', C')."""
    return channels_last(conv(channels_first(x)))


def pad_to_cell(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zero-pad the end of those axes of a map (B, *spatial, C) that are shorter than one cell of `size`."""
    return pad_to(x, [at_least(length, side) for length, side in zip(x.shape[1:-1], size, strict=True)])
