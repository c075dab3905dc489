"""Rules of `paramwise_cfg` in the parameter names of the backbones that `HVTBackbone` takes the place of."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from mmengine.logging import print_log
from torch import nn

from ..backbone import Backbone
from ..errors import InputError, WeightsError
from ..weights.convert import convert_state_dict, read_checkpoint

# In whose names such rules are written. The first that has a family is the code base whose backbone ours replaces.
LAYOUTS = ("mmdet", "mmseg", "mmaction2", "mmpretrain", "official")
OURS = "hvt"
# whole keys that mean all that is so named here, as `openmmlab` says: mmdet's PVTv2 has norms without a name
OUR_KEYS = ("absolute_pos_embed", "position_bias", "logit_scale", "norm")
# parameters that a backbone of the same family may lack: rules for them are without effect there, too
OPTIONAL = (
    "absolute_pos_embed",
    "relative_position_bias_table",
    "logit_scale",
    "cpb_mlp",
    "pos_block",
    "position_bias",
)

Names = Mapping[str, Collection[str]]  # our full name of each parameter -> its full names in a code base


def translate_rules(
    rules: Mapping[str, Any], model: nn.Module, backbones: Mapping[str, Backbone], *, one_each: bool
) -> dict[str, Any]:
    """Rules for parts of parameter names, written for the parameters that they mean.

    What is no backbone is matched by its name. In a backbone a key means what it fits in the first of these namings in
    which it fits anything: that of the framework's own backbone, ours, those of the other code bases; `OUR_KEYS` mean
    what they fit in ours. A rule that fits nothing is told, or refused where it says that it is for the backbone.

    Args:
        rules: part of a name -> settings, as in `custom_keys`.
        model: a whole detector, segmentor or recognizer.
        backbones: path in `model` of each wrapper -> its backbone, an attribute `model`.
        one_each: of the rules that fit a parameter only that of the longest key holds, as in `custom_keys`; else all.

    Returns:
        The rules as they are if matching by name does the same, else one for each parameter, by its full name.

    Raises:
        InputError: a rule for the backbone that fits nothing.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    namings = [_namings(path, backbone) for path, backbone in backbones.items()]
    inside = {name for naming in namings for name in naming[OURS]}
    fitting = {key: {name for name in names if key in name} for key in rules}
    meant = {key: (fitting[key] - inside).union(*(_meaning(key, naming) for naming in namings)) for key in rules}
    for key in rules:
        if not meant[key]:
            _refuse_or_tell(key, like=min(inside))
    if meant == fitting:
        return dict(rules)
    # the longest key first, as MMEngine sorts them; no part of a name is longer than the whole, so that it wins there
    keys = sorted(rules, key=lambda key: (-len(key), key))
    found = {name: [rules[key] for key in keys if name in meant[key]] for name in names}
    return {name: settings[0] if one_each else _all(settings) for name, settings in found.items() if settings}


def _namings(path: str, backbone: Backbone) -> dict[str, Names]:
    """Code base -> how it names the parameters, in the order in which keys are tried."""
    start = f"{path}." if path else ""
    own = [name for name, _ in backbone.named_parameters()]
    state_dict = backbone.state_dict()
    theirs: dict[str, Names] = {}
    for layout in LAYOUTS:
        try:
            sources = read_checkpoint(convert_state_dict(state_dict, to=layout)).sources
        except WeightsError:  # a code base without this family
            continue
        theirs[layout] = {f"{start}model.{name}": [start + other for other in sources.get(name, ())] for name in own}
    first = next(iter(theirs), OURS)
    ours = {f"{start}model.{name}": [f"{start}model.{name}"] for name in own}
    return {first: theirs.get(first, ours), OURS: ours, **theirs}


def _meaning(key: str, namings: Mapping[str, Names]) -> set[str]:
    """Our full names of the parameters of one backbone that a key means."""
    fits = {
        code_base: {own for own, names in naming.items() if any(key in name for name in names)}
        for code_base, naming in namings.items()
    }
    ours = fits[OURS]
    if ours and key in OUR_KEYS:
        return ours
    code_base = next((code_base for code_base, fitting in fits.items() if fitting), OURS)
    if ours and fits[code_base] != ours:
        print_log(
            f"paramwise_cfg: {key!r} is taken for what {code_base} names so, {len(fits[code_base])} parameters; for "
            f"the {len(ours)} that are named so here, write more of their names, such as {min(ours)!r}",
            logger="current",
        )
    return fits[code_base]


def _refuse_or_tell(key: str, like: str) -> None:
    if key in OPTIONAL:
        return
    line = f"paramwise_cfg: no parameter is named like {key!r}; those of the backbone are named like {like!r}"
    if "backbone" in key:
        raise InputError(f"{line}: write the rule for these, or leave it out")
    print_log(f"{line}: the rule is without effect", logger="current", level=logging.WARNING)


def _all(settings: list[Mapping[str, Any]]) -> dict[str, float]:
    """Several rules in one: mmaction2's constructor, which takes no other settings, multiplies theirs."""
    return {name: math.prod(each.get(name, 1.0) for each in settings) for name in ("lr_mult", "decay_mult")}
