"""Rules of `paramwise_cfg` in the parameter names of the backbones that `HVTBackbone` takes the place of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from torch import nn

from .backbone import Backbone
from .errors import InputError, WeightsError
from .weights.convert import convert_state_dict, read_checkpoint

# in whose names such rules are written
LAYOUTS = ("mmdet", "mmseg", "mmaction2", "mmpretrain", "official")
# parameters that a backbone of the same family may lack: rules for them are without effect there, too
OPTIONAL = (
    "absolute_pos_embed",
    "relative_position_bias_table",
    "logit_scale",
    "cpb_mlp",
    "pos_block",
    "position_bias",
)


def translate_rules(
    rules: Mapping[str, Any], model: nn.Module, backbones: Mapping[str, Backbone], *, one_each: bool
) -> dict[str, Any]:
    """Rules for parts of parameter names, with those that fit no name here written for the parameters they mean.

    A rule that fits nothing in any names is told, or refused where it says that it is for the backbone.

    Args:
        rules: part of a name -> settings, as in `custom_keys`.
        model: a whole detector, segmentor or recognizer.
        backbones: path in `model` of each wrapper -> its backbone, an attribute `model`.
        one_each: of the rules that fit a parameter only that of the longest key holds, as in `custom_keys`; else all.

    Raises:
        InputError: a rule for the backbone that fits nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    unknown = sorted((key for key in rules if not any(key in name for name in names)), key=len)
    if not unknown:
        return dict(rules)
    theirs: dict[str, set[str]] = {}
    for path, backbone in backbones.items():
        start = f"{path}." if path else ""
        for own, others in _other_names(backbone).items():
            theirs[f"{start}model.{own}"] = {start + other for other in others}
    translated = {key: settings for key, settings in rules.items() if key not in unknown}
    for key in unknown:  # the longer overrides
        meant = {own for own, others in theirs.items() if any(key in other for other in others)}
        longer = [known for known in rules if known not in unknown and (-len(known), known) < (-len(key), key)]
        spoken_for = {own for own in meant if one_each and any(known in own for known in longer)}
        translated |= dict.fromkeys(sorted(meant - spoken_for), rules[key])
        if meant or key in OPTIONAL:
            continue
        line = f"paramwise_cfg: no parameter is named like {key!r}; those of the backbone are named like {names[0]!r}"
        if "backbone" in key:
            raise InputError(f"{line}: write the rule for these, or leave it out")
        print_log(f"{line}: the rule is without effect", logger="current", level=logging.WARNING)
    return translated


def _other_names(backbone: Backbone) -> dict[str, set[str]]:
    """Our name of each parameter -> its names in the other code bases."""
    found: dict[str, set[str]] = {}
    state_dict = backbone.state_dict()
    for layout in LAYOUTS:
        try:
            sources = read_checkpoint(convert_state_dict(state_dict, to=layout)).sources
        except WeightsError:  # a code base without this family
            continue
        for own, others in sources.items():
            found.setdefault(own, set()).update(others)
    return found
