"""Swin (arXiv:2103.14030) and SwinV2 (arXiv:2111.09883): hierarchical transformers by shifted windows.

Everything here is written over the axes of the window, so that 3-D shifted windows are the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, Stage, check_arguments, check_heads, check_stages, is_whole, keywords, sides
from .errors import InputError
from .layers.block import Block, Mlp, drop_path_rates, hidden_dim
from .layers.maps import channels_first, channels_last
from .layers.patch import PatchEmbed, PatchMerging
from .layers.window_attention import CosineWindowAttention, LogPositionBias, WindowAttention

Window = int | Sequence[int]


def windows_per_stage(
    window_size: Window | Sequence[Window], stages: int, axes: int, *, name: str = "window_size", least: int = 1
) -> list[tuple[int, ...]]:
    """Read windows: one side, one side per axis, or one of these per stage."""
    if not isinstance(window_size, Sequence) or isinstance(window_size, str):
        return [sides(window_size, axes, name, least)] * stages
    if len(window_size) == axes and not any(isinstance(window, Sequence) for window in window_size):
        return [sides(window_size, axes, name, least)] * stages
    if len(window_size) != stages:
        raise InputError(f"{name} {window_size!r} has {len(window_size)} entries for {stages} stages")
    return [sides(window, axes, name, least) for window in window_size]


class ShiftedWindowBackbone(Backbone):
    """What Swin, SwinV2 and Video Swin share: patch embedding, stages of shifted-window blocks, merging, output norms.

    Its arguments are those of `SwinTransformer`; `attention` are those of `attention_options`.

    Attributes:
        attention: of each block.
        post_norm: norm after attention, MLP and patch merging instead of before.
    """

    attention: ClassVar[type[WindowAttention]] = WindowAttention
    post_norm: ClassVar[bool] = False
    norm_feeds_next_stage = False

    @classmethod
    def attention_options(cls, stages: int, **options: Any) -> list[dict[str, Any]]:
        """What `attention` takes in each stage beside the arguments of the constructor."""
        return [options] * stages

    @classmethod
    def arguments(cls) -> set[str]:
        return super().arguments() | keywords(cls.attention_options)

    def __init__(
        self,
        *,
        patch_size: int | Sequence[int],
        window_size: Window | Sequence[Window],
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        output_norm: bool = True,
        norm_eps: float = 1e-5,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_after_downsample: bool = False,
        **attention: Any,
    ) -> None:
        check_stages(out_indices, depths=depths, num_heads=num_heads)
        patch = sides(patch_size, self.axes, "patch_size")
        windows = windows_per_stage(window_size, len(depths), self.axes)
        options, scale = self.attention_options(len(depths), **attention), attention.get("qk_scale")
        check_arguments(
            counts={"in_chans": in_chans, "embed_dim": embed_dim},
            rates={"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
            factors={"mlp_ratio": mlp_ratio, "norm_eps": norm_eps, "qk_scale": 1.0 if scale is None else scale},
            flags={
                "qkv_bias": qkv_bias,
                "patch_norm": patch_norm,
                "output_norm": output_norm,
                "out_after_downsample": out_after_downsample,
            },
        )
        dims = [embed_dim * 2**i for i in range(len(depths))]
        check_heads(dims, num_heads)
        rates = drop_path_rates(drop_path_rate, tuple(depths))

        def block(i: int, j: int) -> Block:
            attn = self.attention(
                dims[i],
                num_heads[i],
                windows[i],
                shifted=j % 2 == 1,
                qkv_bias=qkv_bias,
                attn_drop_rate=attn_drop_rate,
                drop_rate=drop_rate,
                **options[i],
            )
            mlp = Mlp(dims[i], hidden_dim(dims[i], mlp_ratio), drop_rate)
            return Block(dims[i], attn, mlp, norm_eps=norm_eps, drop_path=rates[i][j], post_norm=self.post_norm)

        def downsample(i: int) -> nn.Module:
            if i == 0:
                return PatchEmbed(in_chans, embed_dim, patch, norm_eps=norm_eps if patch_norm else None)
            return PatchMerging(dims[i - 1], post_norm=self.post_norm, norm_eps=norm_eps)

        def stage(i: int) -> Stage:
            after = out_after_downsample and i in out_indices and i + 1 < len(depths)
            norm = nn.LayerNorm(dims[i + after], eps=norm_eps) if output_norm and i in out_indices else None
            # a stage after the last output is there for its downsampling alone
            blocks = [block(i, j) for j in range(depths[i] if i <= max(out_indices) else 0)]
            return Stage(downsample(i), blocks, norm, norm_is_of_next=after)

        super().__init__(
            [stage(i) for i in range(min(max(out_indices) + 1 + out_after_downsample, len(depths)))],
            in_chans=in_chans,
            channels=dims,
            strides=[max(patch[-2:]) * 2**i for i in range(len(depths))],
            out_indices=out_indices,
            out_after_downsample=out_after_downsample,
        )
        self.pos_drop = nn.Dropout(drop_rate)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block) and module.post_norm:
                # a V2 block starts as the identity (the official code's initialisation of the residual post-norm)
                nn.init.zeros_(module.norm1.weight)
                nn.init.zeros_(module.norm2.weight)

    def embed(self, x: Tensor) -> Tensor:
        return self.pos_drop(x)


class SwinTransformer(ShiftedWindowBackbone):
    """Swin Transformer (arXiv:2103.14030).

    Args:
        in_chans: channels of the images.
        patch_size: side of a patch, or (height, width).
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths, num_heads: blocks and heads of each stage.
        window_size: side of a window, (height, width), or one of these per stage.
        mlp_ratio: hidden width of the MLP over its input.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor on the logits instead of `head_dim ** -0.5`.
        drop_rate, attn_drop_rate: dropout of activations and of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        ape_size: grid (one side, or one per axis) of an absolute position embedding, resized bicubically to other
            grids; None for no such embedding.
        patch_norm: LayerNorm after the patch embedding.
        output_norm: LayerNorm of each returned map. The `features_only` models of timm and transformers'
            `Swinv2Backbone` (in DPT, for example) have none.
        norm_eps: eps of all norms.
        out_indices: the stages whose maps are returned; later stages are not built.
        out_after_downsample: return the map of a stage after the downsampling that follows it, with its channels and
            stride (the name is mmpretrain's and mmaction2's); after the last stage there is none.
        small_map: "pad" or "shrink", see `WindowAttention`.

    Raises:
        InputError: arguments that do not fit together; the message names them.
    """

    family = "swin"

    @classmethod
    def classifier_arguments(cls, stages: int) -> dict[str, Any]:
        return {"small_map": "shrink"}

    @classmethod
    def attention_options(  # type: ignore[override] # each class takes its own
        cls, stages: int, *, qk_scale: float | None = None, small_map: str = "pad"
    ) -> list[dict[str, Any]]:
        return [{"qk_scale": qk_scale, "small_map": small_map}] * stages

    def __init__(
        self,
        *,
        patch_size: int | Sequence[int] = 4,
        window_size: Window | Sequence[Window] = 7,
        ape_size: int | Sequence[int] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(patch_size=patch_size, window_size=window_size, **arguments)
        self.absolute_pos_embed: nn.Parameter | None = None
        if ape_size is not None:
            grid, dim = sides(ape_size, self.axes, "ape_size"), len(next(self.stages[0].downsample.parameters()))
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, *grid, dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    def embed(self, x: Tensor) -> Tensor:
        if self.absolute_pos_embed is not None:
            position: Tensor = self.absolute_pos_embed
            if position.shape[1:-1] != x.shape[1:-1]:
                resized = F.interpolate(channels_first(position), size=x.shape[1:-1], mode="bicubic")
                position = channels_last(resized)
            x = x + position
        return super().embed(x)


class SwinTransformerV2(SwinTransformer):
    """Swin Transformer V2 (arXiv:2111.09883): residual post-norm, scaled cosine attention, log-spaced position bias.

    Args:
        window_size: as in `SwinTransformer`.
        pretrained_window_size: the window the weights were trained with, 0 for the present one; given like
            `window_size`. Offsets are divided by it, so that the learned bias extends to the present window.
        extra_norm_every_n_blocks: a further LayerNorm at the end of every so many blocks of a stage, on the main
            branch, as the largest models have it (Sec. 3.2); 0 for none. The name is mmpretrain's.

    The other arguments, and the errors, are those of `SwinTransformer`, but for `qk_scale`.

    Attributes:
        window_size: of each stage, (height, width).
        pretrained_window_size: the same, zeros where offsets are divided by the present window. `load_weights` sets
            it where the weights tell theirs.
    """

    family = "swinv2"
    attention = CosineWindowAttention
    post_norm = True

    @classmethod
    def attention_options(  # type: ignore[override] # each class takes its own
        cls, stages: int, *, pretrained_window_size: Window | Sequence[Window] = 0, small_map: str = "pad"
    ) -> list[dict[str, Any]]:
        name = "pretrained_window_size"
        windows = windows_per_stage(pretrained_window_size, stages, cls.axes, name=name, least=0)
        return [{name: window, "small_map": small_map} for window in windows]

    def __init__(
        self, *, window_size: Window | Sequence[Window] = 8, extra_norm_every_n_blocks: int = 0, **arguments: Any
    ) -> None:
        if not is_whole(extra_norm_every_n_blocks, 0):
            raise InputError(
                f"extra_norm_every_n_blocks is {extra_norm_every_n_blocks!r}: give a whole number, 0 for none"
            )
        super().__init__(window_size=window_size, **arguments)
        for stage in self.stages if extra_norm_every_n_blocks else ():
            for block in stage.blocks[extra_norm_every_n_blocks - 1 :: extra_norm_every_n_blocks]:
                assert isinstance(block, Block)
                block.norm3 = nn.LayerNorm(list(block.norm2.normalized_shape), eps=block.norm2.eps)

    def _position_biases(self) -> list[list[LogPositionBias]]:
        """Of the blocks of each stage."""
        return [[part for part in stage.modules() if isinstance(part, LogPositionBias)] for stage in self.stages]

    @property
    def window_size(self) -> tuple[tuple[int, ...], ...]:
        return tuple(biases[0].window_size for biases in self._position_biases())

    @property
    def pretrained_window_size(self) -> tuple[tuple[int, ...], ...]:
        return tuple(biases[0].pretrained_window_size for biases in self._position_biases())

    @pretrained_window_size.setter
    def pretrained_window_size(self, windows: Sequence[tuple[int, ...]]) -> None:
        for biases, window in zip(self._position_biases(), windows, strict=True):
            for bias in biases:
                bias.pretrained_window_size = window
