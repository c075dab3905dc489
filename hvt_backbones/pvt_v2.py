"""PVTv2 (arXiv:2106.13797): attention over a spatially reduced map, overlapping patches, convolution in the MLP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .backbone import Backbone, Stage, check_arguments, check_heads, check_stages
from .layers.attention import SpatialReductionAttention, depthwise_conv, init_weights
from .layers.block import Block, drop_path_rates, hidden_dim
from .layers.maps import convolve


class OverlapPatchEmbed(nn.Module):
    """Patch embedding by a convolution whose patches overlap (Sec. 3.3).

    Shape: (B, H, W, in_dim) -> (B, ceil(H / stride), ceil(W / stride), dim).
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int, stride: int, *, norm_eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolve(x, self.proj))


class ConvMlp(nn.Module):
    """Feed-forward layer with a 3x3 depthwise convolution before its GELU (Sec. 3.4).

    The linear variant has a ReLU before the convolution, as in the official code. Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, hidden: int, *, relu: bool, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.dwconv = depthwise_conv(hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(convolve(self.relu(self.fc1(x)), self.dwconv))
        return self.drop(self.fc2(self.drop(x)))


class PyramidVisionTransformerV2(Backbone):
    """Pyramid Vision Transformer v2 (arXiv:2106.13797); the defaults are B2.

    The maps have stride 4, 8, 16 and 32 and sides of the images' sides over the stride, rounded up.

    Args:
        in_chans: channels of the images.
        embed_dims, depths, num_heads: channels, blocks and heads of each stage.
        mlp_ratios: hidden width of the MLP over its input, per stage.
        sr_ratios: side of the square of tokens that becomes one key and value, per stage; see
            `SpatialReductionAttention` for what becomes of a remainder.
        qkv_bias: bias of the query, key and value projections.
        qk_scale: factor on the logits instead of `head_dim ** -0.5`.
        linear: the linear-cost variant (Sec. 3.2): keys and values come from the map averaged to 7x7 cells.
        drop_rate, attn_drop_rate: dropout of activations and of attention weights.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: eps of the norms in the blocks and after the stages.
        patch_norm_eps, sr_norm_eps: eps of the norms after patch embeddings and spatial reductions. mmdet and mmseg
            have 1e-6 in all norms.
        out_indices: the stages whose normed maps are returned; later stages are not built.

    Raises:
        InputError: arguments that do not fit together; the message names them.
    """

    family = "pvt_v2"

    def __init__(
        self,
        *,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        linear: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-6,
        patch_norm_eps: float = 1e-5,
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
        check_arguments(
            counts={"in_chans": in_chans},
            rates={"drop_rate": drop_rate, "attn_drop_rate": attn_drop_rate, "drop_path_rate": drop_path_rate},
            factors={
                "norm_eps": norm_eps,
                "patch_norm_eps": patch_norm_eps,
                "sr_norm_eps": sr_norm_eps,
                "qk_scale": 1.0 if qk_scale is None else qk_scale,
            },
            flags={"qkv_bias": qkv_bias, "linear": linear},
        )
        check_heads(embed_dims, num_heads)
        rates = drop_path_rates(drop_path_rate, tuple(depths))

        def block(i: int, j: int) -> Block:
            dim = embed_dims[i]
            attn = SpatialReductionAttention(
                dim,
                num_heads[i],
                sr_ratio=sr_ratios[i],
                linear=linear,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                norm_eps=sr_norm_eps,
                attn_drop_rate=attn_drop_rate,
                drop_rate=drop_rate,
            )
            mlp = ConvMlp(dim, hidden_dim(dim, mlp_ratios[i]), relu=linear, drop_rate=drop_rate)
            return Block(dim, attn, mlp, norm_eps=norm_eps, drop_path=rates[i][j])

        def downsample(i: int) -> OverlapPatchEmbed:
            if i == 0:
                return OverlapPatchEmbed(in_chans, embed_dims[0], kernel_size=7, stride=4, norm_eps=patch_norm_eps)
            return OverlapPatchEmbed(embed_dims[i - 1], embed_dims[i], kernel_size=3, stride=2, norm_eps=patch_norm_eps)

        stages = [
            Stage(downsample(i), [block(i, j) for j in range(depths[i])], nn.LayerNorm(embed_dims[i], eps=norm_eps))
            for i in range(max(out_indices) + 1)
        ]
        strides = [4 * 2**i for i in range(len(depths))]
        super().__init__(stages, in_chans=in_chans, channels=embed_dims, strides=strides, out_indices=out_indices)
        self.apply(init_weights)
