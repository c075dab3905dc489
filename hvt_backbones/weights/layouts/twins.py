"""Twins-PCPVT and Twins-SVT in all code bases; the two differ in the attention of the even blocks alone."""

from __future__ import annotations

from ..keymap import Layout, Rule, rule, rules, same
from .shared import (
    BLOCK,
    CLASSIFIER_NORM,
    HEAD,
    MM_BLOCK,
    MM_CLASSIFIER,
    MM_HEAD,
    REDUCED_ATTENTION,
    SAME_BLOCK,
    multi_head,
)

STAGE = "stages.{s}."
POSITION = "stages.{s}.blocks.0.position.{p}"
LOCAL = same("attn.qkv.{p}")
# in the first block, which is local in SVT
FIRST_ATTENTION = {"twins_pcpvt": "attn.kv.weight", "twins_svt": "attn.qkv.weight"}


def embed(projection: str) -> list[Rule]:
    return [
        rule(f"patch_embeds.{{s}}.{projection}.{{p}}", STAGE + "downsample.proj.{p}"),
        rule("patch_embeds.{s}.norm.{p}", STAGE + "downsample.norm.{p}"),
    ]


def official_and_timm(family: str) -> list[Layout]:
    """timm has no dense model with a norm after each stage; the names are the same otherwise."""
    common = [
        *embed("proj"),
        rule("pos_block.{s}.proj.0.{p}", POSITION),
        *rules("blocks.{s}.{b}.", BLOCK, [*SAME_BLOCK, *LOCAL, *REDUCED_ATTENTION]),
    ]
    extra_norms = rule("norm_list.{s}.{p}", STAGE + "norm.{p}", style="dense")
    return [
        Layout(
            name,
            family,
            anchor="patch_embeds.0.proj.weight",
            requires=(f"blocks.0.0.{FIRST_ATTENTION[family]}",),
            rules=(*common, *more, HEAD),
        )
        for name, more in {"official": (extra_norms, CLASSIFIER_NORM), "timm": (CLASSIFIER_NORM,)}.items()
    ]


def mmpretrain(family: str) -> Layout:
    block = "stages.{s}.{b}."
    return Layout(
        "mmpretrain",
        family,
        anchor="patch_embeds.0.projection.weight",
        requires=(f"stages.0.0.{FIRST_ATTENTION[family]}",),
        rules=(
            *embed("projection"),
            rule("position_encodings.{s}.proj.{p}", POSITION),
            *rules(block, BLOCK, [*MM_BLOCK, *same("attn.proj.{p}"), *LOCAL, *REDUCED_ATTENTION]),
            rule("norm_after_stage{s}.{p}", STAGE + "norm.{p}"),
            MM_HEAD,
        ),
        wrapper=MM_CLASSIFIER,
    )


def mmseg(family: str) -> Layout:
    """mmsegmentation; the global attention is an nn.MultiheadAttention. mmdetection has no Twins."""
    block = "layers.{s}.{b}."
    first = {"twins_pcpvt": "attn.attn.in_proj_weight", "twins_svt": "attn.qkv.weight"}[family]
    outputs = {"local": "attn.proj.{p}", "global": "attn.attn.out_proj.{p}"}
    projections = {
        "twins_pcpvt": rules(block, BLOCK, [(outputs["global"], "attn.proj.{p}")]),
        "twins_svt": [
            rule("layers.{s}.{2b}." + outputs["local"], "stages.{s}.blocks.{2b}.attn.proj.{p}"),
            rule("layers.{s}.{2b+1}." + outputs["global"], "stages.{s}.blocks.{2b+1}.attn.proj.{p}"),
        ],
    }
    return Layout(
        "mmdet",
        family,
        anchor="patch_embeds.0.projection.weight",
        requires=(f"layers.0.0.{first}",),
        rules=(
            *embed("projection"),
            rule("position_encodings.{s}.proj.{p}", POSITION),
            multi_head(block + "attn.attn."),
            *rules(block, BLOCK, [*MM_BLOCK, *LOCAL, *same("attn.sr.{p}", "attn.norm.{p}")]),
            *projections[family],
            rule("norm_list.{s}.{p}", STAGE + "norm.{p}"),
            CLASSIFIER_NORM,
            MM_HEAD,
        ),
        wrapper=MM_CLASSIFIER,
    )


FAMILIES = ("twins_pcpvt", "twins_svt")
TWINS = [layout for family in FAMILIES for layout in (*official_and_timm(family), mmpretrain(family), mmseg(family))]
