"""Rows that the tables of several families share."""

from __future__ import annotations

from ..keymap import Part, Rule, packed, rule, same

BLOCK = "stages.{s}.blocks.{b}."
SAME_BLOCK = same("norm{n}.{p}", "attn.proj.{p}", "mlp.fc{n}.{p}")
MM_BLOCK = [*same("norm{n}.{p}"), ("ffn.layers.0.0.{p}", "mlp.fc1.{p}"), ("ffn.layers.1.{p}", "mlp.fc2.{p}")]
TV_BLOCK = [*same("norm{n}.{p}", "attn.proj.{p}"), ("mlp.0.{p}", "mlp.fc1.{p}"), ("mlp.3.{p}", "mlp.fc2.{p}")]
REDUCED_ATTENTION = same("attn.q.{p}", "attn.kv.{p}", "attn.sr.{p}", "attn.norm.{p}")

# also in mmsegmentation's pretraining files, whose converters leave it as it is, and in mmclassification's first Swin
CLASSIFIER_NORM = rule("norm.{p}", "stages.{last}.norm.{p}", style="classifier")
HEAD = rule("head.{p}", "head.{p}", style="classifier")
# of mmpretrain's classifiers; mmdetection and mmsegmentation have none and pass over it
MM_HEAD = rule("head.fc.{p}", "head.{p}", style="classifier", outer=True)
HF_HEAD = rule("classifier.{p}", "head.{p}", style="classifier", outer=True)
MM_CLASSIFIER = {"classifier": "backbone."}


def multi_head(theirs: str) -> Rule:
    """PyTorch's attention, whose projections are one tensor, where ours has its keys and values at fewer pixels."""
    return packed([Part(theirs + "in_proj_{p}", 3)], [Part(BLOCK + "attn.q.{p}"), Part(BLOCK + "attn.kv.{p}", 2)])
