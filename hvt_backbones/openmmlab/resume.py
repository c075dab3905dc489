"""Go on with a training run of MMEngine that was started with a framework's own backbone.

An optimiser's state is stored by the numbers of the parameters. Those of another backbone come in another order, and
some hold what are two parameters here, so the state is read by the names that the numbers stand for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import WeightsError
from ..weights.convert import COMPUTED, read_checkpoint
from .backbone import backbones_of

REFUSAL = "start the run anew with load_from instead of resume, which takes the weights alone"


@HOOKS.register_module()
class HVTResumeHook(Hook):
    """Lets `resume` take a run that was started with the framework's own backbone, its optimiser's state included.

    For `custom_hooks` of a configuration. Loading such a model's weights does not need it, nor does resuming a run
    that was started with `HVTBackbone`.

    Raises:
        WeightsError: when resuming, a training state whose parameters cannot be told: the optimiser froze or grouped
            them otherwise.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if not runner._resume or "optimizer" not in checkpoint:  # MMEngine has no public word for it
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        names = backbones_of(model)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        if not isinstance(runner.optim_wrapper, OptimWrapperDict):
            prefixes = {f"{name}.": f"{name}.model." for name in names}
            translate_training_state(checkpoint, model, prefixes, runner.optim_wrapper.optimizer)


def translate_training_state(
    checkpoint: dict[str, Any], model: nn.Module, backbones: Mapping[str, str], optimizer: Optimizer
) -> None:
    """Bring the state of optimiser and schedules into the order of `model`; the weights are left as they are.

    Args:
        checkpoint: what MMEngine saved, changed in place. Nothing happens if its backbones are ours already.
        backbones: prefix of their parameters in the checkpoint -> prefix of ours in `model`.
        optimizer: of `model`, new.

    Raises:
        WeightsError: the numbers do not tell the parameters; the run has to be started anew from the weights.
    """
    theirs = _parameter_names(checkpoint["state_dict"], model)
    own = dict(model.named_parameters())
    if all(name in own for name in theirs if name.startswith(tuple(backbones))):
        return
    old = checkpoint["optimizer"]
    numbers = [number for group in old["param_groups"] for number in group["params"]]
    if len(numbers) != len(theirs):
        raise WeightsError(
            f"the optimiser of the checkpoint has {len(numbers)} parameters and its model {len(theirs)}, so the state "
            f"cannot be matched with this backbone: {REFUSAL}"
        )
    number_of = dict(zip(theirs, numbers, strict=True))
    group_of = {number: i for i, group in enumerate(old["param_groups"]) for number in group["params"]}
    sources: dict[str, tuple[str, ...]] = {name: (name,) for name in theirs if name in own}
    fields: dict[str, dict[str, Any]] = {name: dict(old["state"].get(number_of[name], {})) for name in sources}
    for prefix, start in backbones.items():
        inner = {name.removeprefix(prefix): name for name in theirs if name.startswith(prefix)}
        weights = {key: checkpoint["state_dict"][name] for key, name in inner.items()}
        found = read_checkpoint(weights).sources
        sources |= {start + key: tuple(inner[their] for their in keys) for key, keys in found.items()}
        for field, tensors in _by_field(old["state"], {key: number_of[name] for key, name in inner.items()}).items():
            for key, tensor in _translated(tensors, weights, found).items():
                fields.setdefault(start + key, {})[field] = tensor
    _check(fields, sources, own)

    origins = {name: {group_of[number_of[key]] for key in keys} for name, keys in sources.items()}
    names_of = {parameter: name for name, parameter in own.items()}
    names = [[names_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    parents = [_parent(old["param_groups"], set().union(*(origins[name] for name in group))) for group in names]
    numbers_of = {name: i for i, name in enumerate(name for group in names for name in group)}
    checkpoint["optimizer"] = {
        **old,
        "state": {numbers_of[name]: values for name, values in fields.items() if values and name in numbers_of},
        "param_groups": [
            {**_options(old["param_groups"][parent]), "params": [numbers_of[name] for name in group]}
            for parent, group in zip(parents, names, strict=True)
        ],
    }
    for schedule in checkpoint.get("param_schedulers") or ():
        for key, values in schedule.items():
            if isinstance(values, list) and len(values) == len(old["param_groups"]):
                schedule[key] = [values[parent] for parent in parents]


def _parent(groups: list[dict[str, Any]], origins: set[int]) -> int:
    """The group whose settings a new one takes over: that of its parameters, which have to agree."""
    if len({repr(_options(groups[i])) for i in origins}) > 1:
        raise WeightsError(f"the optimiser of the checkpoint grouped the parameters otherwise: {REFUSAL}")
    return min(origins)


def _parameter_names(state_dict: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The parameters among the keys, in the order in which PyTorch numbers them, which is that of the keys."""
    buffers = {name for name, _ in model.named_buffers()}
    return [name for name in state_dict if name not in buffers and name.rpartition(".")[2] not in COMPUTED]


def _by_field(state: Mapping[int, Mapping[str, Any]], numbers: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    fields: dict[str, dict[str, Any]] = {}
    for key, number in numbers.items():
        for field, value in state.get(number, {}).items():
            fields.setdefault(field, {})[key] = value
    return fields


def _translated(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], sources: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Moments have the shapes of the weights and move with them; of a count, which steps raise, all get a copy."""
    if all(isinstance(value, Tensor) and value.shape == weights[key].shape for key, value in values.items()):
        return dict(read_checkpoint(values).tensors)
    return {key: copy.deepcopy(values[keys[0]]) for key, keys in sources.items() if keys[0] in values}


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _check(fields: Mapping[str, Mapping[str, Any]], sources: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    strangers = [name for name in own if name not in sources]
    misfits = [
        name
        for name, values in fields.items()
        for value in values.values()
        if isinstance(value, Tensor) and value.dim() and (name not in own or value.shape != own[name].shape)
    ]
    if wrong := strangers or misfits:
        raise WeightsError(f"the training state has nothing that fits {wrong[0]}: {REFUSAL}")
