"""Every named model as a row of data: architecture, weights, published figures, other names.

Figures are those that the authors publish: Swin and SwinV2 in the README and MODELHUB of microsoft/Swin-Transformer,
PVTv2 in whai362/PVT (FLOPs: arXiv:2106.13797, Table 2), Twins in Meituan-AutoML/Twins, Video Swin in
SwinTransformer/Video-Swin-Transformer and in mmaction2's README; those of torchvision's own trainings and evaluations
in torchvision's weight tables.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from .errors import InputError, WeightsError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .weights.published import PublishedWeights

ModelName = Literal[
    "swin_tiny", "swin_small", "swin_base", "swin_large", "swin_base_384", "swin_large_384",
    "swinv2_tiny_window8", "swinv2_small_window8", "swinv2_base_window8",
    "swinv2_tiny_window16", "swinv2_small_window16", "swinv2_base_window16",
    "swinv2_base_window12_192", "swinv2_base_window12to16_256", "swinv2_base_window12to24_384",
    "swinv2_large_window12_192", "swinv2_large_window12to16_256", "swinv2_large_window12to24_384",
    "swinv2_huge", "swinv2_giant",
    "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5",
    "twins_pcpvt_small", "twins_pcpvt_base", "twins_pcpvt_large",
    "twins_svt_small", "twins_svt_base", "twins_svt_large",
    "video_swin_tiny", "video_swin_small", "video_swin_base", "video_swin_base_window16", "video_swin_large",
]  # fmt: skip
PerStage = tuple[int, ...]


class Arch(TypedDict, total=False):
    """Constructor arguments that the papers fix, of all families; each takes its own."""

    embed_dim: int
    embed_dims: PerStage
    depths: PerStage
    num_heads: PerStage
    mlp_ratios: PerStage
    sr_ratios: PerStage
    linear: bool
    extra_norm_every_n_blocks: int
    window_size: int | PerStage | tuple[tuple[int, int, int], ...]
    window_sizes: PerStage
    pretrained_window_size: PerStage


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One named model.

    Attributes:
        name: as users write it.
        family: `family` of the class that builds it.
        arch: constructor arguments of that class; only what the paper fixes. Tuples have one entry per stage.
        input_size: side of the square images it was trained on, in pixels.
        frames: of the clips it was trained on; None for images.
        params_m: published parameters with 1000 classes (of video models with theirs), in millions.
        flops_g: published multiply-adds at `input_size`, in units of 10^9 (the papers call them FLOPs).
        weights: tag -> where the weights lie: `timm:NAME` or `torchvision:ENUM.MEMBER`, names in the tables of those
            packages; `official:NAME` or `mmaction2:NAME`, of files of video models. The first tag is what
            `pretrained=True` takes.
        top1: tag -> published top-1 accuracy, in percent: on ImageNet-1K, single crop at `input_size`; of video models
            on the data set that the tag ends with, 4 clips x 3 crops (torchvision: 12 clips; SSv2: 1 x 3).
        aliases: other name -> tag of `weights` that the name speaks of, None if of none.
    """

    name: str
    family: str
    input_size: int
    frames: int | None = None
    params_m: float
    flops_g: float | None = None
    top1: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, str]
    arch: Arch
    aliases: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def with_overrides(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor arguments: `arch`, cut to the stages that `depths` has, then `overrides`."""
        depths = overrides.get("depths", self.arch["depths"])
        stages = len(depths) if isinstance(depths, Sequence) else None
        rows = {key: value[:stages] if isinstance(value, tuple) else value for key, value in self.arch.items()}
        return {**rows, **overrides}

    def published(self, tag: str | None = None) -> PublishedWeights:
        """What timm or torchvision says about the weights of `tag`, or of the first one: address, preprocessing, ...

        Raises:
            WeightsError: the model has no such weights, or the installed package does not know them.
        """
        from .weights import published

        if not self.weights:
            raise WeightsError(f"no weights of {self.name} are published: pass a path or a URL")
        tag = self.tags[0] if tag is None else tag
        if tag not in self.weights:
            raise WeightsError(f"{self.name} has no weights {tag!r}; it has {', '.join(self.tags)}")
        library, _, entry = self.weights[tag].partition(":")
        return published.LIBRARIES[library](entry)


# Suffixes of the names in timm's tables and of the official configuration files.
TIMM_TAGS = {"in1k": "ms_in1k", "in22k": "ms_in22k", "in22k_ft_in1k": "ms_in22k_ft_in1k"}
OFFICIAL_SUFFIXES = {"in1k": "finetune", "in22k": "22k", "in22k_ft_in1k": "22kto1k_finetune"}
# Size -> (embed_dim, depth of the third stage, the papers' letter): arXiv:2103.14030, Sec. 3.3. A head has 32 channels.
SWIN_SIZES = {"tiny": (96, 6, "t"), "small": (96, 18, "s"), "base": (128, 18, "b"), "large": (192, 18, "l")}
SWIN_PARAMS = {"tiny": 28, "small": 50, "base": 88, "large": 197}


def swin_arch(size: str, **windows: Unpack[Arch]) -> Arch:
    embed_dim, depth, _ = SWIN_SIZES[size]
    num_heads = tuple(embed_dim * 2**stage // 32 for stage in range(4))
    return {"embed_dim": embed_dim, "depths": (2, 2, depth, 2), "num_heads": num_heads, **windows}


def swin(
    size: str, resolution: int = 224, *, flops_g: float, top1: Mapping[str, float], torchvision: float | None = None
) -> Variant:
    """Swin at 224 (window 7) or 384 (window 12). All sizes have ImageNet-22K weights beside those that `top1` names."""
    window, letter = {224: 7, 384: 12}[resolution], SWIN_SIZES[size][2]
    stem = f"swin_{size}_patch4_window{window}_{resolution}"
    tags = (*top1, "in22k")
    weights = {tag: f"timm:{stem}.{TIMM_TAGS[tag]}" for tag in tags}
    aliases: dict[str, str | None] = {stem: None}
    aliases |= {f"{stem}_{OFFICIAL_SUFFIXES[tag]}": tag for tag in tags if resolution == 384 or tag != "in1k"}
    if resolution == 224:
        aliases[f"swin_{letter}"] = None
    if torchvision:
        weights["torchvision_in1k"] = f"torchvision:Swin_{letter.upper()}_Weights.IMAGENET1K_V1"
        top1 = {**top1, "torchvision_in1k": torchvision}
    return Variant(
        name=f"swin_{size}" if resolution == 224 else f"swin_{size}_{resolution}",
        family="swin",
        arch=swin_arch(size, window_size=window),
        input_size=resolution,
        params_m=SWIN_PARAMS[size],
        flops_g=flops_g,
        weights=weights,
        top1=top1,
        aliases=aliases,
    )


def swinv2(
    size: str,
    window: int,
    tag: str = "in1k",
    resolution: int = 256,
    *,
    flops_g: float | None = None,
    top1: float | None = None,
    torchvision: float | None = None,
) -> Variant:
    """SwinV2 (arXiv:2111.09883), whose last window is its last map.

    Trained on ImageNet-1K at 256; on ImageNet-22K at 192, with window 12, from which the larger ones start (no
    published accuracy); or fine-tuned from that on ImageNet-1K with a larger window.
    """
    short, kind, suffix = {
        "in1k": (f"window{window}", f"window{window}_256", ""),
        "in22k": ("window12_192", "window12_192", "22k"),
        "in22k_ft_in1k": (f"window12to{window}_{resolution}", f"window12to{window}_192to{resolution}", "22kto1k_ft"),
    }[tag]
    name, stem, official = f"swinv2_{size}_{short}", f"swinv2_{size}_{kind}", f"swinv2_{size}_patch4_{kind}"
    weights, top1s = {tag: f"timm:{stem}.{TIMM_TAGS[tag]}"}, {} if top1 is None else {tag: top1}
    aliases: dict[str, str | None] = {other: None for other in (stem, official) if other != name}
    if suffix:
        aliases[f"{official}_{suffix}"] = tag
    if torchvision:
        letter = SWIN_SIZES[size][2]
        weights["torchvision_in1k"] = f"torchvision:Swin_V2_{letter.upper()}_Weights.IMAGENET1K_V1"
        top1s["torchvision_in1k"] = torchvision
        aliases[f"swin_v2_{letter}"] = None
    arch = swin_arch(size, window_size=8 if window == 8 else (window, window, window, window // 2))
    if tag == "in22k_ft_in1k":
        arch["pretrained_window_size"] = (12, 12, 12, 6)
    return Variant(
        name=name,
        family="swinv2",
        arch=arch,
        input_size=resolution,
        params_m=SWIN_PARAMS[size],
        flops_g=flops_g,
        weights=weights,
        top1=top1s,
        aliases=aliases,
    )


def swinv2_scaled(size: str, embed_dim: int, *depths: int, params_m: float) -> Variant:
    """SwinV2-H and -G (arXiv:2111.09883, Sec. 3.2 and 3.5), of which no weights are published.

    They are stated at their resolution of pretraining. A head has 32 channels as in all others; mmpretrain's huge one,
    whose heads it calls uncertain, has 44.
    """
    embed_dims = tuple(embed_dim * 2**stage for stage in range(4))
    return Variant(
        name=f"swinv2_{size}",
        family="swinv2",
        arch={
            "embed_dim": embed_dim,
            "depths": depths,
            "num_heads": tuple(dim // 32 for dim in embed_dims),
            "window_size": (12, 12, 12, 6),
            "extra_norm_every_n_blocks": 6,
        },
        input_size=192,
        params_m=params_m,
        weights={},
        aliases={f"swin_v2_{size[0]}": None, f"swinv2_{size[0]}": None},
    )


def pyramid(family: str, size: str, *aliases: str, arch: Arch, params_m: float, flops_g: float, top1: float) -> Variant:
    """PVTv2 or Twins, trained on ImageNet-1K at 224."""
    name = f"{family}_{size}"
    return Variant(
        name=name,
        family=family,
        arch={**arch, "sr_ratios": (8, 4, 2, 1)},
        input_size=224,
        params_m=params_m,
        flops_g=flops_g,
        weights={"in1k": f"timm:{name}.in1k"},
        top1={"in1k": top1},
        aliases=dict.fromkeys(aliases),
    )


def pvt_arch(*blocks: int, **other: Unpack[Arch]) -> Arch:
    """PVTv2 (arXiv:2106.13797, Table 1) and Twins-PCPVT (arXiv:2104.13840, Table 8)."""
    arch: Arch = {"embed_dims": (64, 128, 320, 512), "depths": blocks, "num_heads": (1, 2, 5, 8)}
    return {**arch, "mlp_ratios": (8, 8, 4, 4), **other}


def pvt_v2(size: str, arch: Arch, *aliases: str, **figures: float) -> Variant:
    return pyramid("pvt_v2", size, f"pvtv2_{size}", *aliases, arch=arch, **figures)


def twins_pcpvt(size: str, *depths: int, **figures: float) -> Variant:
    named = (f"pcpvt_{size}", f"pcpvt_{size}_v0", f"twins_pcpvt_{size[0]}")
    return pyramid("twins_pcpvt", size, *named, arch=pvt_arch(*depths), **figures)


def twins_svt(size: str, embed_dim: int, *depths: int, **figures: float) -> Variant:
    """Twins-SVT (arXiv:2104.13840, Table 9)."""
    embed_dims = tuple(embed_dim * 2**stage for stage in range(4))
    arch: Arch = {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": tuple(dim // 32 for dim in embed_dims),
        "mlp_ratios": (4, 4, 4, 4),
        "window_sizes": (7, 7, 7, 7),
    }
    named = (f"alt_gvt_{size}", f"twins_svt_{size[0]}")
    return pyramid("twins_svt", size, *named, arch=arch, **figures)


def video_swin(
    size: str,
    *,
    window: int = 8,
    params_m: float,
    flops_g: float,
    weights: Mapping[str, tuple[str, float | None]],
    aliases: tuple[str, ...] = (),
) -> Variant:
    """Video Swin (arXiv:2106.13230, Sec. 3.3) at 32 frames of 224 x 224: the sizes of Swin, tubes of 2 x 4 x 4.

    `weights` are tag -> (where they lie, top-1); tags of all publishers but the first begin with the publisher's name.
    """
    letter = SWIN_SIZES[size][2]
    usual = (f"video_swin_{letter}", f"video_swin_{size}_k400") if window == 8 else ()
    names: dict[str, str | None] = dict.fromkeys(usual)
    for tag, (place, _) in weights.items():
        publisher, _, entry = place.partition(":")
        if publisher == "torchvision":
            names[f"swin3d_{letter}"] = None
        elif publisher == "official":
            names[entry] = tag
    return Variant(
        name=f"video_swin_{size}" + ("" if usual else f"_window{window}"),
        family="video_swin",
        arch=swin_arch(size, window_size=((window, 7, 7),) * 4),
        input_size=224,
        frames=32,
        params_m=params_m,
        flops_g=flops_g,
        weights={tag: place for tag, (place, _) in weights.items()},
        top1={tag: top1 for tag, (_, top1) in weights.items() if top1 is not None},
        aliases={**names, **dict.fromkeys(aliases)},
    )


def _in1k(top1: float, finetuned: float | None = None) -> dict[str, float]:
    return {"in1k": top1} if finetuned is None else {"in1k": top1, "in22k_ft_in1k": finetuned}


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        swin("tiny", flops_g=4.5, top1=_in1k(81.2, 80.9), torchvision=81.474),
        swin("small", flops_g=8.7, top1=_in1k(83.2, 83.2), torchvision=83.196),
        swin("base", flops_g=15.4, top1=_in1k(83.5, 85.2), torchvision=83.582),
        swin("large", flops_g=34.5, top1={"in22k_ft_in1k": 86.3}),
        swin("base", 384, flops_g=47.1, top1=_in1k(84.5, 86.4)),
        swin("large", 384, flops_g=103.9, top1={"in22k_ft_in1k": 87.3}),
        swinv2("tiny", 8, flops_g=5.9, top1=81.8, torchvision=82.072),
        swinv2("small", 8, flops_g=11.5, top1=83.7, torchvision=83.712),
        swinv2("base", 8, flops_g=20.3, top1=84.2, torchvision=84.112),
        swinv2("tiny", 16, flops_g=6.6, top1=82.8),
        swinv2("small", 16, flops_g=12.6, top1=84.1),
        swinv2("base", 16, flops_g=21.8, top1=84.6),
        swinv2("base", 12, "in22k", 192),
        swinv2("large", 12, "in22k", 192),
        swinv2("base", 16, "in22k_ft_in1k", 256, flops_g=21.8, top1=86.2),
        swinv2("large", 16, "in22k_ft_in1k", 256, flops_g=47.5, top1=86.9),
        swinv2("base", 24, "in22k_ft_in1k", 384, flops_g=54.7, top1=87.1),
        swinv2("large", 24, "in22k_ft_in1k", 384, flops_g=115.4, top1=87.6),
        swinv2_scaled("huge", 352, 2, 2, 18, 2, params_m=658),
        swinv2_scaled("giant", 512, 2, 2, 42, 4, params_m=3000),
        pvt_v2("b0", pvt_arch(2, 2, 2, 2, embed_dims=(32, 64, 160, 256)), params_m=3.7, flops_g=0.6, top1=70.5),
        pvt_v2("b1", pvt_arch(2, 2, 2, 2), params_m=14.0, flops_g=2.1, top1=78.7),
        pvt_v2("b2", pvt_arch(3, 4, 6, 3), params_m=25.4, flops_g=4.0, top1=82.0),
        pvt_v2(
            "b2_li",
            pvt_arch(3, 4, 6, 3, linear=True),
            "pvt_v2_b2_linear",
            "pvtv2_b2_linear",
            params_m=22.6,
            flops_g=3.9,
            top1=82.1,
        ),
        pvt_v2("b3", pvt_arch(3, 4, 18, 3), params_m=45.2, flops_g=6.9, top1=83.1),
        pvt_v2("b4", pvt_arch(3, 8, 27, 3), params_m=62.6, flops_g=10.1, top1=83.6),
        pvt_v2("b5", pvt_arch(3, 6, 40, 3, mlp_ratios=(4, 4, 4, 4)), params_m=82.0, flops_g=11.8, top1=83.8),
        twins_pcpvt("small", 3, 4, 6, 3, params_m=24.1, flops_g=3.7, top1=81.2),
        twins_pcpvt("base", 3, 4, 18, 3, params_m=43.8, flops_g=6.4, top1=82.7),
        twins_pcpvt("large", 3, 8, 27, 3, params_m=60.9, flops_g=9.5, top1=83.1),
        twins_svt("small", 64, 2, 2, 10, 4, params_m=24.0, flops_g=2.8, top1=81.7),
        twins_svt("base", 96, 2, 2, 18, 2, params_m=56.0, flops_g=8.3, top1=83.2),
        twins_svt("large", 128, 2, 2, 18, 2, params_m=99.2, flops_g=14.8, top1=83.7),
        video_swin(
            "tiny",
            params_m=28,
            flops_g=87.9,
            weights={
                "in1k_ft_k400": ("torchvision:Swin3D_T_Weights.KINETICS400_V1", 77.715),
                "official_in1k_ft_k400": ("official:swin_tiny_patch244_window877_kinetics400_1k", 78.8),
                "mmaction2_in1k_ft_k400": ("mmaction2:swin-tiny_in1k_kinetics400", 78.9),
            },
        ),
        video_swin(
            "small",
            params_m=50,
            flops_g=165.9,
            weights={
                "in1k_ft_k400": ("torchvision:Swin3D_S_Weights.KINETICS400_V1", 79.521),
                "official_in1k_ft_k400": ("official:swin_small_patch244_window877_kinetics400_1k", 80.6),
                "mmaction2_in1k_ft_k400": ("mmaction2:swin-small_in1k_kinetics400", 80.54),
            },
        ),
        video_swin(
            "base",
            params_m=88,
            flops_g=281.6,
            weights={
                "in22k_ft_k400": ("torchvision:Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1", 81.643),
                "in1k_ft_k400": ("torchvision:Swin3D_B_Weights.KINETICS400_V1", 79.427),
                "official_in22k_ft_k400": ("official:swin_base_patch244_window877_kinetics400_22k", 82.7),
                "official_in1k_ft_k400": ("official:swin_base_patch244_window877_kinetics400_1k", 80.6),
                "official_in22k_ft_k600": ("official:swin_base_patch244_window877_kinetics600_22k", 84.0),
                "mmaction2_in1k_ft_k400": ("mmaction2:swin-base_in1k_kinetics400", 80.57),
            },
        ),
        video_swin(
            "base",
            window=16,
            params_m=89,
            flops_g=320.6,
            weights={
                "k400_ft_ssv2": ("official:swin_base_patch244_window1677_sthv2", 69.6),
                # where it starts
                "in22k_ft_k400": ("official:swin_base_patch244_window1677_kinetics400_22k", None),
            },
            aliases=("video_swin_base_sthv2",),
        ),
        video_swin(
            "large",
            params_m=197,
            flops_g=604,
            weights={
                "in22k_ft_k400": ("mmaction2:swin-large_in22k_kinetics400", 83.46),
                "in22k_ft_k700": ("mmaction2:swin-large_in22k_kinetics700", 75.92),
            },
        ),
    )
}

# Any name that is understood -> (name of the row, tag that the name speaks of).
ALIASES: dict[str, tuple[str, str | None]] = {
    alias: (variant.name, tag) for variant in VARIANTS.values() for alias, tag in variant.aliases.items()
}


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts window8 before window16."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the models, sorted; with `pattern`, those that match it as a shell matches file names."""
    pattern = "*" if pattern is None else pattern.lower().replace("-", "_")
    return sorted((name for name in VARIANTS if fnmatchcase(name, pattern)), key=natural_order)


def find_variant(name: str) -> tuple[Variant, str | None]:
    """The row of `name`, and the weight tag that the name speaks of.

    Upper case and hyphens are forgiven. A tag may follow a dot: `swin_base.in22k`, or as timm writes it,
    `swin_base_patch4_window7_224.ms_in22k`.

    Raises:
        InputError: no such model (the nearest names are given), or a name that several models share.
    """
    if not isinstance(name, str):
        raise InputError(f"a model is chosen by its name, a string; got {name!r}")
    stem, _, tag = name.strip().lower().replace("-", "_").partition(".")
    known, alias_tag = (stem, None) if stem in VARIANTS else ALIASES.get(stem, (None, None))
    if known is None:
        raise InputError(f"unknown model {name!r}: {_suggest(stem)} `hvt models` lists all")
    variant = VARIANTS[known]
    if not tag:
        return variant, alias_tag
    for ours, source in variant.weights.items():
        if tag == ours or source.partition(".")[2] == tag:
            return variant, ours
    raise WeightsError(f"{variant.name} has no weights {tag!r}; it has {', '.join(variant.tags)}")


def _suggest(stem: str) -> str:
    # "swinv2_t" and "swinv2_tiny" may mean window 8 or window 16: the user has to say which.
    head, _, letter = stem.rpartition("_")
    sizes = {row[2]: size for size, row in SWIN_SIZES.items()}
    prefixes = (stem, f"{head}_{sizes.get(letter, letter)}")
    near = [name for name in VARIANTS if stem and name.startswith(prefixes)]
    if not near:
        names = difflib.get_close_matches(stem, [*VARIANTS, *ALIASES], n=4, cutoff=0.5)
        near = list(dict.fromkeys(name if name in VARIANTS else ALIASES[name][0] for name in names))
    return f"did you mean {' or '.join(sorted(near, key=natural_order))}?" if near else "no name is near it;"
