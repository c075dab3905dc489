"""SimMIM (arXiv:2111.09886): a Swin learns to paint what is hidden of an image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Layered, is_whole
from .errors import InputError
from .layers.patch import PatchEmbed
from .swin import SwinTransformer

FAMILIES = ("swin", "swinv2")


def random_mask(
    height: int,
    width: int,
    *,
    ratio: float = 0.6,
    mask_patch_size: int = 32,
    patch_size: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide squares of an image at random, so many that they are at least `ratio` of all (Sec. 3.2).

    Args:
        height, width: of the image in pixels.
        ratio: share of the squares that is hidden.
        mask_patch_size: side of a square in pixels.
        patch_size: of the backbone, in pixels.
        generator: of random numbers on the CPU.

    Returns:
        (height / patch_size, width / patch_size), True where a patch is hidden.

    Raises:
        InputError: sizes that do not divide, or a ratio that hides nothing or everything.
    """
    if not 0 < ratio < 1:
        raise InputError(f"mask ratio {ratio!r}: give a number between 0 and 1")
    if not is_whole(mask_patch_size) or mask_patch_size % patch_size:
        raise InputError(f"mask_patch_size {mask_patch_size!r}: give a multiple of the patch size {patch_size}")
    if height % mask_patch_size or width % mask_patch_size:
        raise InputError(f"mask_patch_size {mask_patch_size} does not divide an image of {height}x{width}")
    rows, columns = height // mask_patch_size, width // mask_patch_size
    order = torch.randperm(rows * columns, generator=generator)
    squares = (order < math.ceil(ratio * rows * columns)).view(rows, columns)
    scale = mask_patch_size // patch_size
    return squares.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def _local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the `window` x `window` around each pixel, of what lies inside the image."""
    pool = partial(F.avg_pool2d, kernel_size=window, stride=1, padding=window // 2)
    mean = pool(images, count_include_pad=False)
    square = pool(images.square(), count_include_pad=False)
    count = pool(torch.ones_like(images)) * window**2
    variance = ((square - mean.square()) * (count / (count - 1))).clamp(min=0.0)
    return mean, (variance + 1e-6).sqrt()


def normalise_target(images: Tensor, window: int) -> Tensor:
    """Each pixel by mean and deviation of the `window` x `window` around it, as SwinV2's pre-training does.

    Means leave out what lies outside of the image; the variance is the unbiased one. Shape: (B, C, H, W) -> the same.
    """
    mean, deviation = _local_statistics(images, window)
    return (images - mean) / deviation


class SimMIM(Layered):
    """Masked image modelling over Swin or SwinV2 (Sec. 3): mask tokens in, a linear layer from the last map to pixels.

    Args:
        backbone: with its last stage as the only output.
        norm_target: side of the square around a pixel by which the target is normalised, an odd number (47 in the
            SwinV2 recipes); None for the pixels as they are.

    Raises:
        InputError: another backbone, or a `norm_target` that has no middle.
    """

    def __init__(self, backbone: SwinTransformer, *, norm_target: int | None = None) -> None:
        super().__init__()
        if not isinstance(backbone, SwinTransformer) or backbone.axes != 2 or len(backbone.out_indices) > 1:
            raise InputError("SimMIM takes a Swin or SwinV2 of images whose last stage is its only output")
        if norm_target is not None and not (is_whole(norm_target, 3) and norm_target % 2):
            raise InputError(f"norm_target is {norm_target!r}: give an odd number of pixels from 3, or None")
        embed = backbone.stages[0].downsample
        assert isinstance(embed, PatchEmbed)
        patch = embed.patch_size
        if len(set(patch)) > 1:
            raise InputError(f"patch_size {patch}: SimMIM paints squares, give one side")
        self.backbone = backbone
        self.patch_size = patch[0]
        self.norm_target = norm_target
        stride = backbone.strides[-1]
        self.mask_token = nn.Parameter(torch.zeros(len(next(embed.parameters()))))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Conv2d(backbone.num_features, stride**2 * backbone.in_chans, 1)
        self.shuffle = nn.PixelShuffle(stride)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Paint the whole image from what is not hidden.

        Args:
            images: (B, C, H, W), sides that the backbone's last stride divides.
            mask: (B, H / patch, W / patch), True (or 1) where a patch is hidden.

        Returns:
            (B, C, H, W): the reconstruction, of normalised pixels with `norm_target`.

        Raises:
            InputError: sizes that do not fit.
        """
        stride, sides = self.backbone.strides[-1], images.shape[-2:]
        if any(side % stride for side in sides):
            raise InputError(f"the images are {sides[0]}x{sides[1]}: SimMIM needs multiples of {stride}")
        expected = (len(images), *(side // self.patch_size for side in sides))
        if tuple(mask.shape) != expected:
            raise InputError(f"the mask has the shape {tuple(mask.shape)}; expected {expected}, one value per patch")
        hidden = mask[..., None].bool()

        def embed(x: Tensor) -> Tensor:
            return self.backbone.embed(torch.where(hidden, self.mask_token.to(x.dtype), x))

        return self.shuffle(self.decoder(self.backbone(images, embed)[-1]))

    def loss(self, images: Tensor, reconstruction: Tensor, mask: Tensor) -> Tensor:
        """Mean absolute error of the hidden pixels (Sec. 3.4), a scalar in float32 or wider."""
        wide = torch.promote_types(images.dtype, torch.float32)
        target, hidden = images.to(wide), self.hidden_pixels(mask).to(wide)
        if self.norm_target is not None:
            target = normalise_target(target, self.norm_target)
        error = (target - reconstruction.to(wide)).abs() * hidden
        return error.sum() / (hidden.sum() + 1e-5) / images.shape[1]

    def hidden_pixels(self, mask: Tensor) -> Tensor:
        """(B, 1, H, W), True where `mask` hides the patch of a pixel."""
        hidden = mask[:, None].bool()
        return hidden.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)

    def fill_in(self, images: Tensor, reconstruction: Tensor, mask: Tensor) -> Tensor:
        """The images with what is hidden as it is painted, (B, C, H, W).

        With `norm_target` the painting is brought back by mean and deviation of the true pixels, of which the model
        knows nothing.
        """
        if self.norm_target is not None:
            mean, deviation = _local_statistics(images, self.norm_target)
            reconstruction = reconstruction * deviation + mean
        return torch.where(self.hidden_pixels(mask), reconstruction, images)

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def set_sequential_attention(self, max_logits: int | None) -> None:
        self.backbone.set_sequential_attention(max_logits)

    def layer_ids(self) -> Iterator[tuple[str, int]]:
        """As `Backbone.layer_ids`; the mask token is of the first layer, the decoder one above the last block."""
        layers = {f"backbone.{name}": layer for name, layer in self.backbone.layer_ids()} | {"mask_token": 0}
        yield from layers.items()
        yield from ((f"decoder.{name}", max(layers.values()) + 1) for name, _ in self.decoder.named_parameters())
