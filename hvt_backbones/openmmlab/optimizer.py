"""Groups of parameters for an optimiser: rules of `paramwise_cfg` in any code base's names, and layer-wise decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..backbone import is_spared
from ..errors import InputError
from .backbone import HVTBackbone, backbones_of
from .rules import translate_rules


def _with_translated_rules(constructor: DefaultOptimWrapperConstructor, model: nn.Module) -> OptimWrapper:
    """MMEngine's constructor of optimisers, with rules for the parameters that an `HVTBackbone` has in other names."""
    whole = getattr(model, "module", model)
    if constructor.paramwise_cfg and (backbones := backbones_of(whole)):
        cfg = dict(constructor.paramwise_cfg)
        if "custom_keys" in cfg:
            cfg["custom_keys"] = translate_rules(cfg["custom_keys"], whole, backbones, one_each=True)
        # mmaction2's has them beside its other settings, which are numbers
        rules = {key: cfg.pop(key) for key in list(cfg) if key != "custom_keys" and isinstance(cfg[key], Mapping)}
        constructor.paramwise_cfg = {**cfg, **translate_rules(rules, whole, backbones, one_each=False)}
    return _construct(constructor, model)


# Frameworks' configurations name no constructor, or one of MMEngine's subclasses: there is no other place for it.
_construct = DefaultOptimWrapperConstructor.__call__
DefaultOptimWrapperConstructor.__call__ = _with_translated_rules


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class HVTLayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay over an `HVTBackbone` (BEiT, arXiv:2106.08254, App. C).

    The last block of the backbone, and all that is no backbone, has the learning rate of the optimiser; each block
    before it, down to the patch embedding, has `layer_decay_rate` times that of the block after it. Norms, biases and
    other vectors of the whole model, and the backbone's position tables, have no weight decay, unless a rule of
    `paramwise_cfg` says what they have. Parameters with equal settings share a group.

    Args:
        optim_wrapper_cfg: MMEngine's; the optimiser needs an `lr`.
        paramwise_cfg: `layer_decay_rate` in (0, 1], and any of MMEngine's own rules (`custom_keys`, `norm_decay_mult`,
            `bypass_duplicate`, ...); the decay multiplies what they give.

    Raises:
        InputError: no `layer_decay_rate`, no `lr`, or a model without an `HVTBackbone`.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise InputError(f"paramwise_cfg needs layer_decay_rate, a number above 0 and up to 1, not {rate!r}")
        if self.base_lr is None:
            raise InputError("the optimizer needs an lr, which layer_decay_rate multiplies")
        self.layer_decay_rate = rate

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        """As MMEngine's, which calls this for each child; `params` is extended by groups."""
        if not prefix and not any(isinstance(child, HVTBackbone) for child in module.modules()):
            raise InputError("layer_decay_rate is for models with an HVTBackbone, and there is none")
        super().add_params(params, module, prefix, is_dcn_module)
        if isinstance(module, HVTBackbone):
            self._decay_backbone(params, module)
        if not prefix:
            params[:] = self._merged(params)

    def _decay_backbone(self, params: list[dict[str, Any]], module: HVTBackbone) -> None:
        layers = dict(module.model.layer_ids())
        last = max(layers.values())
        names = {parameter: name for name, parameter in module.model.named_parameters()}
        for group in params:
            name = names.get(group["params"][0])
            if name is None:
                continue
            group.setdefault("lr", self.base_lr)
            group["lr"] *= self.layer_decay_rate ** (last - layers[name])
            if is_spared(name):
                group.setdefault("weight_decay", 0.0)

    def _merged(self, params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of several parameters, over which an optimiser loops in one go."""
        groups: dict[str, dict[str, Any]] = {}
        for group in params:
            settings = {"lr": self.base_lr, **group}
            (parameter,) = settings.pop("params")
            if parameter.dim() <= 1:
                settings.setdefault("weight_decay", 0.0)
            same = groups.setdefault(repr(sorted(settings.items())), {"params": [], **settings})
            same["params"].append(parameter)
        return list(groups.values())
