"""Video Swin in the official code, mmaction2 and torchvision: Swin's names in each, with a patch of three axes."""

from __future__ import annotations

from typing import Any

from ..keymap import Layout, rule, rules
from .shared import BLOCK, HEAD, MM_CLASSIFIER, SAME_BLOCK, TV_BLOCK
from .swin import TABLE, V1_ATTENTION, buffers, embed, merging

FAMILY = "video_swin"
THEIR_BLOCK = "layers.{s}.blocks.{b}."
NUMBERED_NORM = rule("norm{s}.{p}", "stages.{s}.norm.{p}")
# both have mmaction's recognizers, with a head beside the backbone
CLS_HEAD = rule("cls_head.fc_cls.{p}", "head.{p}", style="classifier", outer=True)
COMMON: dict[str, Any] = {
    "family": FAMILY,
    "axes": 3,
    "anchor": "patch_embed.proj.weight",
    "requires": ("layers.0.blocks.0." + TABLE[0],),
    "buffers": buffers(THEIR_BLOCK + "attn", FAMILY),
    "wrapper": MM_CLASSIFIER,
}
RULES = (
    *embed("patch_embed."),
    *rules(THEIR_BLOCK, BLOCK, [*SAME_BLOCK, *V1_ATTENTION]),
    *merging("layers.{s-1}.downsample."),
    CLS_HEAD,
)
TV_STAGE = "features.{2s}.{b}."

VIDEO_SWIN = [
    # the official model has one output and one norm, mmaction2's a norm for each of `out_indices`
    Layout(
        "mmaction2",
        marks=tuple(f"norm{stage}.weight" for stage in range(4)),
        rules=(*RULES, NUMBERED_NORM),
        **COMMON,
    ),
    Layout("official", rules=(*RULES, rule("norm.{p}", "stages.{last}.norm.{p}")), **COMMON),
    Layout(
        "torchvision",
        family=FAMILY,
        axes=3,
        anchor="patch_embed.proj.weight",
        requires=("features.0.0." + TABLE[0],),
        rules=(
            *embed("patch_embed."),
            *rules(TV_STAGE, BLOCK, [*TV_BLOCK, *V1_ATTENTION]),
            *merging("features.{2s-1}."),
            rule("norm.{p}", "stages.{last}.norm.{p}"),
            HEAD,
        ),
        buffers=buffers(TV_STAGE + "attn", FAMILY),
    ),
]
