"""Read a folder of reference cases, and build for each our model with the same arithmetic.

Everything follows from a case's `family`, `key_layout`, `source_file` and `kwargs`; no case is named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import hvt_backbones as hvt


@dataclass(frozen=True)
class Case:
    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "case.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "weights.safetensors")

    @property
    def family(self) -> str:
        return self.facts["family"]

    @property
    def layout(self) -> str:
        return self.facts["key_layout"]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self.facts["kwargs"]

    @property
    def is_classifier(self) -> bool:
        return "logits" in self.facts["outputs"]

    def __str__(self) -> str:
        return self.folder.name


class NamedVariant(Case):
    """An entry of `variants.json.gz`: the keys and shapes of a full-size model, without values."""

    def __init__(self, name: str, row: dict[str, Any]) -> None:
        super().__init__(Path(name))
        dense = name.endswith("_dense") or row["family"] == "video_swin"  # without a head
        self.__dict__["facts"] = {
            **row,
            "key_layout": "official",
            "source_file": "",
            "outputs": () if dense else ("logits",),
        }

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        zero = torch.zeros(())  # one value seen in every place: no memory for 200 million parameters
        return {key: zero.expand(shape) for key, shape in self.facts["state_dict"]}

    @property
    def buffers(self) -> set[str]:
        return set(self.facts["buffers_in_state_dict"])

    @property
    def num_parameters(self) -> int:
        return self.facts["num_parameters"]

    @property
    def unused_parameters(self) -> int:
        """What Twins' dense code keeps and never uses: the classifier's norm and head."""
        if self.is_classifier or self.family != "twins":
            return 0
        return sum(t.numel() for key, t in self.weights.items() if key.startswith(("norm.", "head.")))


def find_cases(folder: Path) -> list[Case]:
    return [Case(path.parent) for path in sorted(folder.glob("*/case.json"))]


def make_model(case: Case) -> nn.Module:
    """Our model for a case. KeyError: no such family or layout here (yet)."""
    if case.family == "simmim":
        return _simmim(case)
    cls, arguments = BUILDERS[case.family, case.layout](case)
    if case.is_classifier:
        last = (len(arguments["depths"]) - 1,)
        return hvt.Classifier(cls(**arguments, out_indices=last), case.kwargs.get("num_classes", 1000))
    stages = range(len(arguments["depths"]))
    given = case.facts.get("stages") or (stages[-1:] if case.family == "video_swin" else stages)
    return cls(**arguments, out_indices=tuple(given))


def empty_model(case: Case) -> nn.Module:
    """Our model for a case, without spending time on initial values."""
    with torch.device("meta"):
        model = make_model(case)
    return model.to_empty(device="cpu")


def build(case: Case) -> nn.Module:
    """Our model for a case, with its weights loaded and every key accounted for."""
    model = make_model(case)
    report = hvt.load_weights(model, case.weights, layout=case.layout)
    assert not report.initialised, f"left at random: {report.initialised}"
    return model


def _eps(kwargs: dict[str, Any], default: float) -> float:
    norm = kwargs.get("norm_layer") or kwargs.get("norm_cfg") or {}
    return norm.get("eps", default)


def _renamed(kwargs: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: kwargs[theirs] for theirs, ours in names.items() if theirs in kwargs}


SAME = ("depths", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale", "patch_norm", "drop_rate", "attn_drop_rate")


def _swin(case: Case) -> tuple[type[hvt.Backbone], dict[str, Any]]:
    kwargs = {**case.kwargs, **case.kwargs.get("arch", {})}
    depths, window = kwargs["depths"], kwargs.get("window_size", 7 if case.family == "swin" else 8)
    shrinks = (
        case.is_classifier
        or kwargs.get("pad_small_map") is False
        or (case.layout == "mmpretrain" and "pad_small_map" not in kwargs)
    )
    arguments = {
        **{name: kwargs[name] for name in SAME if name in kwargs},
        **_renamed(
            kwargs,
            {
                "embed_dim": "embed_dim",
                "embed_dims": "embed_dim",
                "patch_size": "patch_size",
                "in_chans": "in_chans",
                "in_channels": "in_chans",
            },
        ),
        "norm_eps": _eps(kwargs, 1e-5),
        "small_map": "shrink" if shrinks else "pad",
    }
    size = kwargs.get("img_size", kwargs.get("pretrain_img_size", 224))
    size = (size, size) if isinstance(size, int) else tuple(size)
    patch = kwargs.get("patch_size", 4)
    grids = [tuple(side // patch // 2**i for side in size) for i in range(len(depths))]
    windows = window if isinstance(window, list) else [window] * len(depths)
    if case.is_classifier:  # the official classifiers fix the windows, and with them the tables, for one image size
        windows = [min(side, *grid) for side, grid in zip(windows, grids, strict=True)]
    arguments["window_size"] = tuple((side, side) for side in windows)
    if kwargs.get("ape") or kwargs.get("use_abs_pos_embed"):
        arguments["ape_size"] = grids[0]
    if case.family == "swin":
        return hvt.SwinTransformer, arguments
    pretrained = kwargs.get("pretrained_window_sizes", [0] * len(depths))
    return hvt.SwinTransformerV2, {**arguments, "pretrained_window_size": tuple((side, side) for side in pretrained)}


def _simmim(case: Case) -> hvt.SimMIM:
    encoder, norm_target = case.kwargs["encoder"], case.kwargs["config"]["NORM_TARGET"]
    family = "swinv2" if "V2" in encoder["class"] else "swin"
    arguments = {name: value for name, value in encoder.items() if name not in ("class", "drop_path_rate")}
    of_encoder = Case(case.folder)
    of_encoder.__dict__["facts"] = {
        "family": family,
        "key_layout": case.layout,
        "kwargs": arguments,
        "outputs": ("logits",),
    }
    cls, arguments = _swin(of_encoder)
    last = len(arguments["depths"]) - 1
    return hvt.SimMIM(
        cls(**arguments, out_indices=(last,)), norm_target=norm_target["PATCH_SIZE"] if norm_target["ENABLE"] else None
    )


PYRAMID = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios", "qkv_bias", "in_chans", "linear")


def _pvt_v2(case: Case) -> tuple[type[hvt.Backbone], dict[str, Any]]:
    kwargs = case.kwargs
    arguments = {name: kwargs[name] for name in PYRAMID if name in kwargs}
    arguments["norm_eps"] = _eps(kwargs, 1e-5 if case.layout == "official" else 1e-6)
    if case.layout == "mmdet":
        heads = kwargs["num_heads"]
        arguments |= {"depths": kwargs["num_layers"], "embed_dims": [kwargs["embed_dims"] * n for n in heads]}
        arguments |= {"patch_norm_eps": arguments["norm_eps"], "sr_norm_eps": arguments["norm_eps"]}
    return hvt.PyramidVisionTransformerV2, arguments


def _twins(case: Case) -> tuple[type[hvt.Backbone], dict[str, Any]]:
    kwargs = {**case.kwargs, **case.kwargs.get("arch", {})}
    arguments = {name: kwargs[name] for name in PYRAMID if name in kwargs}
    last = len(kwargs["depths"]) - 1
    default_eps = 1e-6 if case.layout == "timm" else 1e-5
    arguments["norm_eps"] = _eps(kwargs, default_eps)
    arguments["norm_after_stage"] = tuple(
        (case.is_classifier and i == last) or kwargs.get("extra_norm", False) for i in range(last + 1)
    )
    if isinstance(kwargs.get("patch_size"), int):
        arguments["patch_size"] = kwargs["patch_size"]
    if case.layout == "mmpretrain":
        after = kwargs.get("norm_after_stage", [False] * last + [True])
        arguments |= {"norm_after_stage": tuple(after), "patch_size": kwargs["patch_sizes"][0]}
        arguments |= {"pad_patches": True, "sr_norm_eps": arguments["norm_eps"]}
    windows = kwargs.get("wss") or kwargs.get("window_sizes")
    if windows is None:
        return hvt.TwinsPCPVT, arguments
    masks = case.layout == "mmpretrain" or case.facts["source_file"].startswith("segmentation/")
    return hvt.TwinsSVT, {**arguments, "window_sizes": tuple(windows), "mask_padding": masks}


def _video_swin(case: Case) -> tuple[type[hvt.Backbone], dict[str, Any]]:
    kwargs = {**case.kwargs, **case.kwargs.get("arch", {})}
    arguments = {name: kwargs[name] for name in (*SAME, "patch_size", "embed_dim", "window_size") if name in kwargs}
    return hvt.VideoSwinTransformer, {"embed_dim": kwargs.get("embed_dims"), **arguments}


BUILDERS = {
    **{(family, layout): _swin for family in ("swin", "swinv2") for layout in ("official", "mmpretrain", "timm")},
    ("swin", "mmdet"): _swin,
    **{("pvt_v2", layout): _pvt_v2 for layout in ("official", "mmdet", "timm")},
    **{("twins", layout): _twins for layout in ("official", "mmpretrain", "timm")},
    **{("video_swin", layout): _video_swin for layout in ("official", "mmaction2")},
}


def outputs(case: Case, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Our value for every output of the case that is not a gradient, in the case's shapes."""
    if case.family == "simmim":
        return _simmim_outputs(case, model, images)
    backbone = model.backbone if case.is_classifier else model
    raw: dict[str, Tensor] = {}
    handles = []
    for i, stage in enumerate(backbone.stages):
        handles.append(stage.register_forward_hook(lambda _m, _a, y, i=i: raw.__setitem__(f"blocks{i}", y[0])))
        handles.append(stage.norm.register_forward_hook(lambda _m, _a, y, i=i: raw.__setitem__(f"normed{i}", y)))
        handles.append(stage.downsample.register_forward_hook(lambda _m, _a, y, i=i: raw.__setitem__(f"down{i}", y)))
    result = model(images)
    for handle in handles:
        handle.remove()

    found: dict[str, Tensor] = {}
    count = len(backbone.stages)
    if case.is_classifier:
        normed = raw[f"normed{count - 1}"]
        found["logits"] = result
        found["features"] = normed.flatten(1, 2).mean(1)
        # timm gives its features as it keeps them: maps channels-last (Swin) or -first (PVT), or tokens (Twins)
        shapes = {"pvt_v2": normed.movedim(-1, 1), "twins": normed.flatten(1, 2)}
        found["forward_features"] = shapes.get(case.family, normed)
        # timm's Swin and Twins give what a stage passes on, its PVT has the norm inside the stage
        kind = "normed" if case.family == "pvt_v2" else "blocks"
        found |= {f"stage{i}": raw[f"{kind}{i}"].movedim(-1, 1) for i in range(count)}
    else:
        found |= {f"stage{i}": x for i, x in zip(backbone.out_indices, result, strict=True)}
        found["features"] = result[-1]
    for i in range(count):
        layer = raw[f"down{i + 1}"] if i + 1 < count else raw[f"blocks{i}"]
        found[f"layer{i}"] = layer.movedim(-1, 1) if case.family == "video_swin" else layer.flatten(1, -2)
    return found


def _simmim_outputs(case: Case, model: hvt.SimMIM, images: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handle = model.backbone.register_forward_hook(lambda _m, _a, maps: found.__setitem__("encoder_features", maps[-1]))
    found["reconstruction"] = model(images, case.tensors["mask"])
    handle.remove()
    found["loss"] = model.loss(images, found["reconstruction"], case.tensors["mask"])[None]
    return found


def loss(case: Case, found: dict[str, Tensor]) -> Tensor:
    """The scalar whose gradients a case stores."""
    if case.family == "simmim":
        return found["loss"].sum()
    if case.is_classifier:
        return found["logits"].square().sum()
    return torch.stack([x.pow(3).sum() for name, x in found.items() if name.startswith("stage")]).sum()


def gradients(case: Case, model: nn.Module, images: Tensor, scalar: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, stored) of each gradient; ours are brought into the case's layout by the converter."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(scalar, [images, *parameters.values()], allow_unused=True)
    ours = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads[1:], strict=True)
    }
    theirs = hvt.convert_state_dict(ours, to=case.layout, layout="hvt")
    for name, stored in case.tensors.items():
        if name == "grad_input":
            yield name, grads[0], stored
        elif name.startswith("grad:"):
            yield name, theirs[name.removeprefix("grad:")], stored
