"""Swin and SwinV2 in all code bases."""

from __future__ import annotations

from typing import Any

from ..keymap import Layout, Part, Rows, Rule, packed, rule, rules, same
from .shared import BLOCK, CLASSIFIER_NORM, HEAD, HF_HEAD, MM_BLOCK, MM_CLASSIFIER, MM_HEAD, SAME_BLOCK, TV_BLOCK
from .tensor_rules import MASK_TOKEN, OFFICIAL_EMBEDDING, TOKENS, UNFOLD

TABLE = ("attn.relative_position_bias_table", "attn.position_bias.table")
V1_ATTENTION = [*same("attn.qkv.{p}"), TABLE]
V2_LOGITS = [
    *same("attn.qkv.weight", "attn.logit_scale"),
    ("attn.cpb_mlp.{n}.{p}", "attn.position_bias.mlp.{n}.{p}"),
    ("attn.rpe_mlp.{n}.{p}", "attn.position_bias.mlp.{n}.{p}"),  # of the files of SimMIM, which its loader renames
]
V2_ATTENTION = [*V2_LOGITS, *same("attn.q_bias", "attn.v_bias")]


def embed(theirs: str, projection: str = "proj") -> list[Rule]:
    return [
        rule(f"{theirs}{projection}.{{p}}", "stages.0.downsample.proj.{p}"),
        rule(f"{theirs}norm.{{p}}", "stages.0.downsample.norm.{p}"),
    ]


def merging(theirs: str) -> list[Rule]:
    return rules(theirs, "stages.{s}.downsample.", same("reduction.weight", "norm.{p}"))


def simmim(decoder: str) -> list[Rule]:
    return [
        rule("mask_token", "mask_token", MASK_TOKEN, style="simmim"),
        rule(f"{decoder}.{{p}}", "decoder.{p}", style="simmim", outer=True),
    ]


def buffers(attention: str, family: str, index: str = "index") -> dict[str, str]:
    coordinates = {f"{attention}.relative_coords_table": "coordinates"} if family == "swinv2" else {}
    return {f"{attention}.relative_position_index": index, **coordinates}


# ---- the official code and timm: the same blocks; timm puts the merging at the start of the next stage


def official_and_timm(family: str, attention: Rows) -> list[Layout]:
    """timm first: what has not its marks is official."""
    block = "layers.{s}.blocks.{b}."
    mark = "layers.0.blocks.0.attn." + ("logit_scale" if family == "swinv2" else "relative_position_bias_table")
    common = [*embed("patch_embed."), *rules(block, BLOCK, [*SAME_BLOCK, *attention])]
    official = Layout(
        "official",
        family,
        anchor="patch_embed.proj.weight",
        requires=(mark,),
        rules=(
            *common,
            *merging("layers.{s-1}.downsample."),
            rule("absolute_pos_embed", "absolute_pos_embed", OFFICIAL_EMBEDDING),
            rule("norm{s}.{p}", "stages.{s}.norm.{p}", style="dense"),
            CLASSIFIER_NORM,
            HEAD,
            *simmim("decoder.0"),
        ),
        buffers=buffers(f"{block}attn", family),
        wrapper={"simmim": "encoder."},
    )
    timm = Layout(
        "timm",
        family,
        anchor="patch_embed.proj.weight",
        requires=(mark,),
        marks=("layers.1.downsample.reduction.weight", "head.fc.weight"),
        unlike=("layers.0.downsample.reduction.weight",),
        rules=(
            *common,
            *merging("layers.{s}.downsample."),
            rule("norm.{p}", "stages.{last}.norm.{p}"),
            rule("head.fc.{p}", "head.{p}", style="classifier"),
        ),
    )
    return [timm, official]


# ---- OpenMMLab: mmpretrain has both; the Swin of mmdetection and mmsegmentation has the same names, SwinV2 they lack


def openmmlab(family: str, attention: Rows, merge: list[Rule]) -> dict[str, Any]:
    block = "stages.{s}.blocks.{b}."
    mark = "logit_scale" if family == "swinv2" else "relative_position_bias_table"
    attention = [*attention, *same("attn.proj.{p}")]
    window_attention = [(theirs.replace("attn.", "attn.w_msa."), ours) for theirs, ours in attention]
    return {
        "family": family,
        "anchor": "patch_embed.projection.weight",
        "requires": (f"stages.0.blocks.0.attn.w_msa.{mark}",),
        "rules": (
            *embed("patch_embed.", "projection"),
            rule("absolute_pos_embed", "absolute_pos_embed", TOKENS),
            *rules(block, BLOCK, [*MM_BLOCK, *window_attention]),
            *merge,
            rule("norm{s}.{p}", "stages.{s}.norm.{p}"),
            CLASSIFIER_NORM,
            MM_HEAD,
            *simmim("neck.decoder.0"),
        ),
        "buffers": buffers(f"{block}attn.w_msa", family),
        "wrapper": {**MM_CLASSIFIER, "simmim": "backbone."},
    }


MM_SWIN = openmmlab(
    "swin",
    V1_ATTENTION,
    [
        rule("stages.{s-1}.downsample.reduction.weight", "stages.{s}.downsample.reduction.weight", UNFOLD),
        rule("stages.{s-1}.downsample.norm.{p}", "stages.{s}.downsample.norm.{p}", UNFOLD),
    ],
)
MM_SWINV2 = openmmlab(
    "swinv2",
    V2_ATTENTION,
    [
        rule("stages.{s}.downsample.reduction.weight", "stages.{s}.downsample.reduction.weight", UNFOLD),
        rule("stages.{s}.downsample.norm.{p}", "stages.{s}.downsample.norm.{p}"),
    ],
)

# ---- torchvision: patch embedding, stage, merging, stage, ... in one nn.Sequential

TV_STAGE = "features.{2s+1}.{b}."


def torchvision(family: str, mark: str, attention: list[Rule]) -> Layout:
    return Layout(
        "torchvision",
        family,
        anchor="features.0.0.weight",
        requires=(f"features.1.0.attn.{mark}",),
        rules=(
            rule("features.0.0.{p}", "stages.0.downsample.proj.{p}"),
            rule("features.0.2.{p}", "stages.0.downsample.norm.{p}"),
            *attention,
            *rules(TV_STAGE, BLOCK, TV_BLOCK),
            *merging("features.{2s}."),
            rule("norm.{p}", "stages.{last}.norm.{p}"),
            HEAD,
        ),
        buffers=buffers(f"{TV_STAGE}attn", family, "flat index"),
    )


# the key's part of the bias counts as zero in torchvision's forward, whatever it is
TV_QKV_BIAS = packed(
    [Part(TV_STAGE + "attn.qkv.bias", 3)], [Part(BLOCK + "attn.q_bias"), Part(None), Part(BLOCK + "attn.v_bias")]
)

# ---- transformers

HF_BLOCK = "encoder.layers.{s}.blocks.{b}."
HF_ANCHOR = "embeddings.patch_embeddings.projection.weight"
HF_COMMON = [
    *embed("embeddings.patch_embeddings.", "projection")[:1],
    rule("embeddings.norm.{p}", "stages.0.downsample.norm.{p}"),
    rule("embeddings.position_embeddings", "absolute_pos_embed", TOKENS),
    *merging("encoder.layers.{s-1}.downsample."),
    rule("layernorm.{p}", "stages.{last}.norm.{p}", style="classifier"),
    HF_HEAD,
]
# Beside the module of the others; inside it in version 4 and in the files of either version. MaskFormer counts from 0.
# The dense models have a `layernorm` too, of which they make no use.
HF_OUTPUT_NORMS = [
    *(
        rule(f"hidden_states_norms.{stage}.{{p}}", "stages.{s}.norm.{p}", style="dense", outer=outer)
        for outer in (True, False)
        for stage in ("stage{s+1}", "{s}")
    ),
    rule("swin.layernorm.{p}", "stages.{last}.norm.{p}", style="classifier"),
]
HF_NORMS = [("layernorm_before.{p}", "norm1.{p}"), ("layernorm_after.{p}", "norm2.{p}")]
# the modules of SwinV2, of Swin in version 4, and of the files of either version
HF_BERT_BLOCK = [
    *HF_NORMS,
    ("attention.output.dense.{p}", "attn.proj.{p}"),
    ("intermediate.dense.{p}", "mlp.fc1.{p}"),
    ("output.dense.{p}", "mlp.fc2.{p}"),
]


def hf_qkv(attention: str, parameter: str, *names: str) -> Rule:
    parts = [Part(f"{HF_BLOCK}{attention}{name}.{parameter}") for name in names]
    return packed(parts, [Part(f"{BLOCK}attn.qkv.{parameter}")])


def hf_swin(table: str, qkv: Rule, block: Rows, **more: Any) -> Layout:
    return Layout(
        "huggingface",
        "swin",
        anchor=HF_ANCHOR,
        requires=(f"encoder.layers.0.blocks.0.{table}",),
        rules=(
            *HF_COMMON,
            qkv,
            *rules(HF_BLOCK, BLOCK, [*block, (table, TABLE[1])]),
            *HF_OUTPUT_NORMS,
        ),
        **more,
    )


HF_SWIN = hf_swin(
    "attention.relative_position_bias.relative_position_bias_table",
    hf_qkv("attention.", "{p}", "q_proj", "k_proj", "v_proj"),
    [*HF_NORMS, ("attention.o_proj.{p}", "attn.proj.{p}"), *same("mlp.fc{n}.{p}")],
    wrapper={"classifier": "swin.", "dense": "swin."},
)
HF_SWIN_FILES = hf_swin(
    "attention.self.relative_position_bias_table",
    hf_qkv("attention.self.", "{p}", "query", "key", "value"),
    HF_BERT_BLOCK,
    reads_only=True,
)
HF_SWINV2 = Layout(
    "huggingface",
    "swinv2",
    anchor=HF_ANCHOR,
    requires=("encoder.layers.0.blocks.0.attention.self.logit_scale",),
    rules=(
        *HF_COMMON,
        hf_qkv("attention.self.", "weight", "query", "key", "value"),
        *rules(
            HF_BLOCK + "attention.self.",
            BLOCK + "attn.",
            [
                ("query.bias", "q_bias"),
                ("value.bias", "v_bias"),
                *same("logit_scale"),
                ("continuous_position_bias_mlp.{n}.{p}", "position_bias.mlp.{n}.{p}"),
            ],
        ),
        *rules(HF_BLOCK, BLOCK, HF_BERT_BLOCK),
    ),
    wrapper={"classifier": "swinv2."},
)

SWIN = [
    *official_and_timm("swin", V1_ATTENTION),
    Layout("mmpretrain", marks=("head.fc.weight",), **MM_SWIN),
    Layout("mmdet", **MM_SWIN),
    torchvision("swin", TABLE[0].removeprefix("attn."), rules(TV_STAGE, BLOCK, V1_ATTENTION)),
    HF_SWIN,
    HF_SWIN_FILES,
]
SWINV2 = [
    *official_and_timm("swinv2", V2_ATTENTION),
    Layout("mmpretrain", **MM_SWINV2),
    torchvision("swinv2", "logit_scale", [*rules(TV_STAGE, BLOCK, V2_LOGITS), TV_QKV_BIAS]),
    HF_SWINV2,
]
