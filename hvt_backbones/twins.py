"""Twins (arXiv:2104.13840): PCPVT, global attention over a reduced map; SVT, which alternates it with local windows.

Both tell tokens where they are by a depthwise convolution after the first block of each stage (CPVT, arXiv:2102.10882).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .backbone import Backbone, Stage, check_arguments, check_heads, check_stages, sides
from .errors import InputError
from .layers.attention import SpatialReductionAttention, depthwise_conv, init_weights
from .layers.block import Block, Mlp, drop_path_rates, hidden_dim
from .layers.patch import PatchEmbed
from .ops import window_attention
from .ops.windows import padding_value


class LocalAttention(nn.Module):
    """Attention inside windows that do not overlap (locally-grouped self-attention, Sec. 3.2).

    Args:
        dim, num_heads: channels and heads.
        window_size: tokens per window along each axis; the map is zero-padded to whole windows.
        mask_padding: hide the padding from the other tokens, as the segmentation code does.
        qkv_bias, qk_scale, attn_drop_rate, drop_rate: as in `SpatialReductionAttention`.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        *,
        mask_padding: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.mask_padding = mask_padding
        self.qk_scale = qk_scale
        self.attn_drop_rate = attn_drop_rate
        self.max_logits: int | None = None  # by `Backbone.set_sequential_attention`
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = window_attention(
            self.qkv(x),
            None,
            self.window_size,
            (0,) * len(self.window_size),
            self.num_heads,
            scale=self.qk_scale,
            pad_value=padding_value(x, self.window_size, self.qkv),
            mask_padding=self.mask_padding,
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            max_logits=self.max_logits,
        )
        return self.proj_drop(self.proj(x))


class Twins(Backbone):
    """What PCPVT and SVT share: patch embeddings, the position encoding, norms after stages.

    Args:
        local: the attention of every second block from the first, `local(stage, dim, num_heads, **options)`; None for
            `SpatialReductionAttention` in all.

    The other arguments are those of `TwinsPCPVT`.
    """

    @classmethod
    def classifier_arguments(cls, stages: int) -> dict[str, Any]:
        return {"norm_after_stage": (False,) * (stages - 1) + (True,)}

    def __init__(
        self,
        local: Callable[..., nn.Module] | None,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float],
        norm_after_stage: bool | Sequence[bool],
        in_chans: int = 3,
        patch_size: int | Sequence[int] = 4,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        pad_patches: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_eps: float = 1e-6,
        sr_norm_eps: float = 1e-5,
        out_indices: Sequence[int] = (0, 1, 2, 3),
    ) -> None:
        check_stages(
            out_indices,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
        )
        norms = (norm_after_stage,) * len(depths) if isinstance(norm_after_stage, bool) else norm_after_stage
        if not isinstance(norms, Sequence) or not all(isinstance(norm, bool) for norm in norms):
            raise InputError(f"norm_after_stage is {norms!r}: give True or False, or one of them per stage")
        check_stages(out_indices, depths=depths, norm_after_stage=norms)
        check_arguments(
            counts={"in_chans": in_chans},
            rates={"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
            factors={
                "norm_eps": norm_eps,
                "sr_norm_eps": sr_norm_eps,
                "qk_scale": 1.0 if qk_scale is None else qk_scale,
            },
            flags={"qkv_bias": qkv_bias, "pad_patches": pad_patches},
        )
        check_heads(embed_dims, num_heads)
        patch = sides(patch_size, 2, "patch_size")
        rates = drop_path_rates(drop_path_rate, tuple(depths))

        def attention(i: int, j: int) -> nn.Module:
            given: dict[str, Any] = {
                "qkv_bias": qkv_bias,
                "qk_scale": qk_scale,
                "attn_drop_rate": attn_drop_rate,
                "drop_rate": drop_rate,
            }
            if local is not None and j % 2 == 0:
                return local(i, embed_dims[i], num_heads[i], **given)
            return SpatialReductionAttention(
                embed_dims[i], num_heads[i], sr_ratio=sr_ratios[i], norm_eps=sr_norm_eps, **given
            )

        def block(i: int, j: int) -> Block:
            dim = embed_dims[i]
            mlp = Mlp(dim, hidden_dim(dim, mlp_ratios[i]), drop_rate)
            position = depthwise_conv(dim) if j == 0 else None
            return Block(dim, attention(i, j), mlp, norm_eps=norm_eps, drop_path=rates[i][j], position=position)

        def downsample(i: int) -> PatchEmbed:
            before, size = (in_chans, patch) if i == 0 else (embed_dims[i - 1], (2, 2))
            return PatchEmbed(before, embed_dims[i], size, pad=pad_patches)

        stages = [
            Stage(
                downsample(i),
                [block(i, j) for j in range(depths[i])],
                nn.LayerNorm(embed_dims[i], eps=norm_eps) if norms[i] else None,
            )
            for i in range(max(out_indices) + 1)
        ]
        strides = [max(patch) * 2**i for i in range(len(depths))]
        super().__init__(stages, in_chans=in_chans, channels=embed_dims, strides=strides, out_indices=out_indices)
        self.apply(init_weights)


class TwinsPCPVT(Twins):
    """Twins-PCPVT (arXiv:2104.13840, Sec. 3.1); the defaults are PCPVT-Small.

    Args:
        in_chans: channels of the images.
        patch_size: side of a patch of the first stage, or (height, width); each further stage halves the map.
        embed_dims, depths, num_heads: channels, blocks and heads of each stage.
        mlp_ratios: hidden width of the MLP over its input, per stage.
        sr_ratios: side of the square of tokens that becomes one key and value, per stage; see
            `SpatialReductionAttention` for what becomes of a remainder.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor on the logits instead of `head_dim ** -0.5`.
        norm_after_stage: which stages end in a norm, for the output and for the next stage: True or False, or one per
            stage. The official detection and segmentation code has none in PCPVT and all in SVT, the classifiers have
            the last in both.
        pad_patches: zero-pad a map that patches do not divide, as mmpretrain does, instead of dropping the remainder.
        drop_rate, attn_drop_rate: dropout of activations and of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: eps of the norms in the blocks and after the stages; patch embeddings have 1e-5.
        sr_norm_eps: eps of the norms after spatial reductions; mmpretrain has 1e-6.
        out_indices: the stages whose maps are returned; later stages are not built.

    Raises:
        InputError: arguments that do not fit together; the message names them.
    """

    family = "twins_pcpvt"

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        norm_after_stage: bool | Sequence[bool] = False,
        **arguments: Any,
    ) -> None:
        arguments |= {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        super().__init__(None, embed_dims=embed_dims, norm_after_stage=norm_after_stage, **arguments)


class TwinsSVT(Twins):
    """Twins-SVT (arXiv:2104.13840, Sec. 3.2): blocks attend locally and globally in turn; the defaults are SVT-Small.

    Args:
        window_sizes: side of the local windows of each stage, or (height, width); maps are zero-padded to whole
            windows.
        mask_padding: hide that padding from the other tokens, as the segmentation code and mmpretrain do, but the
            detection code does not. In effect only where both sides of a map need padding, as there.

    The other arguments, and the errors, are those of `TwinsPCPVT`.
    """

    family = "twins_svt"

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 10, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        norm_after_stage: bool | Sequence[bool] = True,
        window_sizes: Sequence[int | Sequence[int]] = (7, 7, 7, 7),
        mask_padding: bool = False,
        **arguments: Any,
    ) -> None:
        check_stages(arguments.get("out_indices", (0,)), depths=depths, window_sizes=window_sizes)
        check_arguments(flags={"mask_padding": mask_padding})
        windows = [sides(window, 2, "window_sizes") for window in window_sizes]

        def local(stage: int, dim: int, num_heads: int, **options: Any) -> nn.Module:
            return LocalAttention(dim, num_heads, windows[stage], mask_padding=mask_padding, **options)

        arguments |= {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        super().__init__(local, embed_dims=embed_dims, norm_after_stage=norm_after_stage, **arguments)
