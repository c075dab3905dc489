"""PVTv2 in all code bases."""

from __future__ import annotations

from ..keymap import Layout, Part, packed, rule, rules, same
from .shared import BLOCK, HEAD, HF_HEAD, MM_CLASSIFIER, MM_HEAD, REDUCED_ATTENTION, SAME_BLOCK, multi_head
from .tensor_rules import CONV_1X1

STAGE = "stages.{s}."
DWCONV = ("mlp.dwconv.dwconv.{p}", "mlp.dwconv.{p}")
OFFICIAL = Layout(
    "official",
    "pvt_v2",
    anchor="patch_embed1.proj.weight",
    requires=("block1.0.mlp.dwconv.dwconv.weight",),
    rules=(
        rule("patch_embed{s+1}.proj.{p}", STAGE + "downsample.proj.{p}"),
        rule("patch_embed{s+1}.norm.{p}", STAGE + "downsample.norm.{p}"),
        *rules("block{s+1}.{b}.", BLOCK, [*SAME_BLOCK, *REDUCED_ATTENTION, DWCONV]),
        rule("norm{s+1}.{p}", STAGE + "norm.{p}"),
        HEAD,
    ),
)
TIMM = Layout(
    "timm",
    "pvt_v2",
    anchor="patch_embed.proj.weight",
    requires=("stages.0.blocks.0.mlp.dwconv.weight",),
    rules=(
        rule("patch_embed.proj.{p}", "stages.0.downsample.proj.{p}"),
        rule("patch_embed.norm.{p}", "stages.0.downsample.norm.{p}"),
        *rules(STAGE, STAGE, same("downsample.proj.{p}", "downsample.norm.{p}", "norm.{p}")),
        *rules(BLOCK, BLOCK, [*SAME_BLOCK, *REDUCED_ATTENTION, *same("mlp.dwconv.{p}")]),
        HEAD,
    ),
)
# a stage is the list of patch embedding, blocks and norm; the linear layers of the MLP are 1x1 convolutions
MM_BLOCK = "layers.{s}.1.{b}."
MMDET = Layout(
    "mmdet",
    "pvt_v2",
    anchor="layers.0.0.projection.weight",
    requires=("layers.0.1.0.attn.attn.in_proj_weight",),
    rules=(
        rule("layers.{s}.0.projection.{p}", STAGE + "downsample.proj.{p}"),
        rule("layers.{s}.0.norm.{p}", STAGE + "downsample.norm.{p}"),
        multi_head(MM_BLOCK + "attn.attn."),
        rule(MM_BLOCK + "ffn.layers.0.weight", BLOCK + "mlp.fc1.weight", CONV_1X1),
        rule(MM_BLOCK + "ffn.layers.4.weight", BLOCK + "mlp.fc2.weight", CONV_1X1),
        *rules(
            MM_BLOCK,
            BLOCK,
            [
                *same("norm{n}.{p}", "attn.sr.{p}", "attn.norm.{p}"),
                ("attn.attn.out_proj.{p}", "attn.proj.{p}"),
                ("ffn.layers.0.bias", "mlp.fc1.bias"),
                ("ffn.layers.1.{p}", "mlp.dwconv.{p}"),
                ("ffn.layers.4.bias", "mlp.fc2.bias"),
            ],
        ),
        rule("layers.{s}.2.{p}", STAGE + "norm.{p}"),
        MM_HEAD,
    ),
    wrapper=MM_CLASSIFIER,
)
HF_STAGE = "encoder.layers.{s}."
HF_BLOCK = HF_STAGE + "blocks.{b}."
HUGGINGFACE = Layout(
    "huggingface",
    "pvt_v2",
    anchor="encoder.layers.0.patch_embedding.proj.weight",
    requires=("encoder.layers.0.blocks.0.mlp.dwconv.dwconv.weight",),
    rules=(
        rule(HF_STAGE + "patch_embedding.proj.{p}", STAGE + "downsample.proj.{p}"),
        rule(HF_STAGE + "patch_embedding.layer_norm.{p}", STAGE + "downsample.norm.{p}"),
        packed(
            [Part(HF_BLOCK + "attention.key.{p}"), Part(HF_BLOCK + "attention.value.{p}")],
            [Part(BLOCK + "attn.kv.{p}")],
        ),
        *rules(
            HF_BLOCK,
            BLOCK,
            [
                ("layer_norm_{n}.{p}", "norm{n}.{p}"),
                ("attention.query.{p}", "attn.q.{p}"),
                ("attention.proj.{p}", "attn.proj.{p}"),
                ("attention.spatial_reduction.{p}", "attn.sr.{p}"),
                ("attention.layer_norm.{p}", "attn.norm.{p}"),
                ("mlp.dense{n}.{p}", "mlp.fc{n}.{p}"),
                DWCONV,
            ],
        ),
        rule(HF_STAGE + "layer_norm.{p}", STAGE + "norm.{p}"),
        HF_HEAD,
    ),
    wrapper={"classifier": "pvt_v2."},
)
PVT_V2 = [OFFICIAL, TIMM, MMDET, HUGGINGFACE]
