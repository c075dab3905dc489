"""Pictures beside what SimMIM sees of them and what it paints: `hvt reconstruct`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .atomic import whole_file
from .model_file import Masking
from .simmim import SimMIM, random_mask
from .weights.published import Preprocessing

GUTTER = 4  # pixels


@torch.inference_mode()
def reconstruct(model: SimMIM, batches: Iterable[Tensor], masking: Masking, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hide squares of pictures and have them painted.

    Args:
        model: in eval mode.
        batches: of pictures, (B, C, H, W) each.
        masking: what is hidden.
        seed: of the masks.

    Returns:
        All pictures, (N, C, H, W), their masks, (N, H / patch, W / patch), and what the model paints, on the CPU.

    Raises:
        InputError: pictures that such masks do not fit, or none.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for images in batches:
        masks = [
            random_mask(
                *images.shape[2:],
                ratio=masking.ratio,
                mask_patch_size=masking.mask_patch_size,
                patch_size=model.patch_size,
                generator=generator,
            )
            for _ in images
        ]
        mask = torch.stack(masks).to(images.device)
        found.append((images.cpu(), mask.cpu(), model(images, mask).cpu()))
    images, mask, painted = (torch.cat(parts) for parts in zip(*found, strict=True))
    return images, mask, painted


def write_sheet(
    path: Path, model: SimMIM, images: Tensor, mask: Tensor, painted: Tensor, preprocessing: Preprocessing
) -> None:
    """Write a PNG with a row for each picture: itself, without what was hidden, and with that as it is painted.

    Raises:
        InputError: it cannot be written.
    """
    images, mask, painted = images.float().cpu(), mask.cpu(), painted.float().cpu()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pictures = images * std + mean
    grey = torch.where(model.hidden_pixels(mask), 0.5, pictures)
    filled = model.fill_in(images, painted, mask) * std + mean
    columns = [F.pad(part.clamp(0, 1), (0, GUTTER, 0, GUTTER), value=1.0) for part in (pictures, grey, filled)]
    sheet = torch.cat(list(torch.cat(columns, dim=3)), dim=1)[:, :-GUTTER, :-GUTTER]
    pixels = (255 * sheet).round().byte().permute(1, 2, 0).squeeze(2).numpy()
    with whole_file(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")
