"""What changes in a tensor itself between code bases, in both directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import WeightsError
from ..keymap import Facts, TensorRule


def _tokens_to_grid(tensor: Tensor, facts: Facts) -> Tensor:
    """(1, L, C) or (1, C, H, W) -> (1, H, W, C)."""
    if tensor.dim() == 4:
        return tensor.movedim(1, -1)
    tokens = tensor.shape[1]
    side = math.isqrt(tokens)
    if facts.grid is not None and math.prod(facts.grid) == tokens:
        return tensor.unflatten(1, facts.grid)
    if side * side != tokens:
        raise WeightsError(
            f"the absolute position embedding has {tokens} tokens, which is no square: say its grid, as "
            "ape_size=(height, width) of the model or of convert_state_dict"
        )
    return tensor.unflatten(1, (side, side))


def _grid_to_tokens(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.flatten(1, 2)


def _grid_to_official(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.movedim(-1, 1) if facts.style == "dense" else tensor.flatten(1, 2)


# nn.Unfold keeps a channel's four pixels together, row before column; the official code concatenates the pixels,
# column before row.
UNFOLD_ORDER = torch.tensor([0, 2, 1, 3])


def _from_unfold_order(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., UNFOLD_ORDER.to(tensor.device), :].flatten(-2)


def _to_unfold_order(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.unflatten(-1, (4, -1))[..., UNFOLD_ORDER.to(tensor.device), :].transpose(-1, -2).flatten(-2)


def _from_1x1_conv(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.flatten(1)


def _to_1x1_conv(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor[:, :, None, None]


def _flat(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor.flatten()


def _as_a_token(tensor: Tensor, facts: Facts) -> Tensor:
    return tensor[None, None]


TOKENS = TensorRule(_tokens_to_grid, _grid_to_tokens)
OFFICIAL_EMBEDDING = TensorRule(_tokens_to_grid, _grid_to_official)
UNFOLD = TensorRule(_from_unfold_order, _to_unfold_order)
CONV_1X1 = TensorRule(_from_1x1_conv, _to_1x1_conv)
MASK_TOKEN = TensorRule(_flat, _as_a_token)
