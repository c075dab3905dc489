"""Every named model as a row of data: architecture, weights, published figures, other names.

Figures are those that the authors publish: Swin and SwinV2 in the README and MODELHUB of microsoft/Swin-Transformer,
PVTv2 in whai362/PVT (FLOPs: arXiv:2106.13797, Table 2), Twins in Meituan-AutoML/Twins, Video Swin in
SwinTransformer/Video-Swin-Transformer and in mmaction2's README; those of torchvision's own trainings and evaluations
in torchvision's weight tables.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypedDict

from .errors import InputError, WeightsError

if TYPE_CHECKING:
    from .weights.published import PublishedWeights


PerStage = tuple[int, ...]


class Arch(TypedDict, total=False):
    """Constructor arguments of the families' classes that the papers fix."""

    embed_dim: int
    embed_dims: PerStage
    depths: PerStage
    num_heads: PerStage
    mlp_ratios: PerStage
    sr_ratios: PerStage
    linear: bool
    window_size: int | PerStage | tuple[tuple[int, int, int], ...]
    window_sizes: PerStage
    pretrained_window_size: PerStage


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One named model.

    Attributes:
        name: as users write it.
        family: `family` of the class that builds it.
        arch: constructor arguments of that class.
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
    arch: Arch
    input_size: int
    frames: int | None = None
    params_m: float
    flops_g: float | None = None
    weights: Mapping[str, str]
    top1: Mapping[str, float] = field(default_factory=dict)
    aliases: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self.weights)

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


def swin_arch(size: str, window_size: int | PerStage | tuple[tuple[int, int, int], ...]) -> Arch:
    embed_dim, depth, _ = SWIN_SIZES[size]
    num_heads = tuple(embed_dim * 2**stage // 32 for stage in range(4))
    return {"embed_dim": embed_dim, "depths": (2, 2, depth, 2), "num_heads": num_heads, "window_size": window_size}


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
        arch=swin_arch(size, window),
        input_size=resolution,
        params_m=SWIN_PARAMS[size],
        flops_g=flops_g,
        weights=weights,
        top1=top1,
        aliases=aliases,
    )


def swinv2(size: str, window: int, *, flops_g: float, top1: float, torchvision: float | None = None) -> Variant:
    """SwinV2 trained on ImageNet-1K at 256 (arXiv:2111.09883). The last map is 8x8, and so is its window."""
    letter = SWIN_SIZES[size][2].upper()
    name = f"swinv2_{size}_window{window}"
    weights, top1s = {"in1k": f"timm:{name}_256.ms_in1k"}, {"in1k": top1}
    aliases: dict[str, str | None] = {f"{name}_256": None, f"swinv2_{size}_patch4_window{window}_256": None}
    if torchvision:
        weights["torchvision_in1k"] = f"torchvision:Swin_V2_{letter}_Weights.IMAGENET1K_V1"
        top1s["torchvision_in1k"] = torchvision
        aliases[f"swin_v2_{letter.lower()}"] = None
    return Variant(
        name=name,
        family="swinv2",
        arch=swin_arch(size, 8 if window == 8 else (window, window, window, 8)),
        input_size=256,
        params_m=SWIN_PARAMS[size],
        flops_g=flops_g,
        weights=weights,
        top1=top1s,
        aliases=aliases,
    )


def swinv2_22k(size: str) -> Variant:
    """SwinV2 pre-trained on ImageNet-22K at 192: what the larger windows start from; no published accuracy."""
    stem = f"swinv2_{size}_window12_192"
    official = f"swinv2_{size}_patch4_window12_192"
    return Variant(
        name=stem,
        family="swinv2",
        arch=swin_arch(size, (12, 12, 12, 6)),
        input_size=192,
        params_m=SWIN_PARAMS[size],
        weights={"in22k": f"timm:{stem}.ms_in22k"},
        aliases={official: None, f"{official}_22k": "in22k"},
    )


def swinv2_finetuned(size: str, window: int, resolution: int, *, flops_g: float, top1: float) -> Variant:
    """SwinV2 fine-tuned on ImageNet-1K with a larger window than the (12, 12, 12, 6) of its pre-training."""
    stem = f"swinv2_{size}_window12to{window}_192to{resolution}"
    official = f"swinv2_{size}_patch4_window12to{window}_192to{resolution}"
    arch = swin_arch(size, (window, window, window, window // 2))
    return Variant(
        name=f"swinv2_{size}_window12to{window}_{resolution}",
        family="swinv2",
        arch={**arch, "pretrained_window_size": (12, 12, 12, 6)},
        input_size=resolution,
        params_m=SWIN_PARAMS[size],
        flops_g=flops_g,
        weights={"in22k_ft_in1k": f"timm:{stem}.ms_in22k_ft_in1k"},
        top1={"in22k_ft_in1k": top1},
        aliases={stem: None, official: None, f"{official}_22kto1k_ft": "in22k_ft_in1k"},
    )


def pvt_v2(
    size: str,
    depths: PerStage,
    *,
    params_m: float,
    flops_g: float,
    top1: float,
    aliases: tuple[str, ...] = (),
    embed_dims: PerStage = (64, 128, 320, 512),
    mlp_ratios: PerStage = (8, 8, 4, 4),
    linear: bool = False,
) -> Variant:
    """PVTv2 (arXiv:2106.13797, Table 1)."""
    name = f"pvt_v2_{size}"
    arch: Arch = {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": mlp_ratios,
        "sr_ratios": (8, 4, 2, 1),
    }
    if linear:
        arch["linear"] = True
    return Variant(
        name=name,
        family="pvt_v2",
        arch=arch,
        input_size=224,
        params_m=params_m,
        flops_g=flops_g,
        weights={"in1k": f"timm:{name}.in1k"},
        top1={"in1k": top1},
        aliases=dict.fromkeys([f"pvtv2_{size}", *aliases]),
    )


def twins(kind: str, size: str, arch: Arch, *, params_m: float, flops_g: float, top1: float) -> Variant:
    """Twins (arXiv:2104.13840, Tables 8 and 9)."""
    name = f"twins_{kind}_{size}"
    official = {"pcpvt": (f"pcpvt_{size}", f"pcpvt_{size}_v0"), "svt": (f"alt_gvt_{size}",)}[kind]
    return Variant(
        name=name,
        family=f"twins_{kind}",
        arch={**arch, "sr_ratios": (8, 4, 2, 1)},
        input_size=224,
        params_m=params_m,
        flops_g=flops_g,
        weights={"in1k": f"timm:{name}.in1k"},
        top1={"in1k": top1},
        aliases=dict.fromkeys([*official, f"twins_{kind}_{size[0]}"]),
    )


def pcpvt_arch(depths: PerStage) -> Arch:
    return {
        "embed_dims": (64, 128, 320, 512),
        "depths": depths,
        "num_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4),
    }


def svt_arch(embed_dim: int, depths: PerStage) -> Arch:
    embed_dims = tuple(embed_dim * 2**stage for stage in range(4))
    return {
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": tuple(dim // 32 for dim in embed_dims),
        "mlp_ratios": (4, 4, 4, 4),
        "window_sizes": (7, 7, 7, 7),
    }


Published = Mapping[str, tuple[str, float | None]]  # tag -> (entry of a publisher, top-1)


def video_swin(
    size: str, *, window: int = 8, params_m: float, flops_g: float, alias: str | None = None, **publishers: Published
) -> Variant:
    """Video Swin (arXiv:2106.13230, Sec. 3.3) at 32 frames of 224 x 224: the sizes of Swin, tubes of 2 x 4 x 4.

    Tags of all publishers but the first one begin with the publisher's name.
    """
    usual, letter = window == 8, SWIN_SIZES[size][2]
    weights, top1s = {}, {}
    aliases: dict[str, str | None] = {f"video_swin_{letter}": None, f"video_swin_{size}_k400": None} if usual else {}
    for place, (publisher, entries) in enumerate(publishers.items()):
        if publisher == "torchvision":
            aliases[f"swin3d_{letter}"] = None
        for kind, (entry, top1) in entries.items():
            tag = f"{publisher}_{kind}" if place else kind
            weights[tag] = f"{publisher}:{entry}"
            if top1 is not None:
                top1s[tag] = top1
            if publisher == "official":
                aliases[entry] = tag
    if alias is not None:
        aliases[alias] = None
    return Variant(
        name=f"video_swin_{size}" + ("" if usual else f"_window{window}"),
        family="video_swin",
        arch=swin_arch(size, ((window, 7, 7),) * 4),
        input_size=224,
        frames=32,
        params_m=params_m,
        flops_g=flops_g,
        weights=weights,
        top1=top1s,
        aliases=aliases,
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
        swinv2_22k("base"),
        swinv2_22k("large"),
        swinv2_finetuned("base", 16, 256, flops_g=21.8, top1=86.2),
        swinv2_finetuned("large", 16, 256, flops_g=47.5, top1=86.9),
        swinv2_finetuned("base", 24, 384, flops_g=54.7, top1=87.1),
        swinv2_finetuned("large", 24, 384, flops_g=115.4, top1=87.6),
        pvt_v2("b0", (2, 2, 2, 2), params_m=3.7, flops_g=0.6, top1=70.5, embed_dims=(32, 64, 160, 256)),
        pvt_v2("b1", (2, 2, 2, 2), params_m=14.0, flops_g=2.1, top1=78.7),
        pvt_v2("b2", (3, 4, 6, 3), params_m=25.4, flops_g=4.0, top1=82.0),
        pvt_v2(
            "b2_li",
            (3, 4, 6, 3),
            params_m=22.6,
            flops_g=3.9,
            top1=82.1,
            linear=True,
            aliases=("pvt_v2_b2_linear", "pvtv2_b2_linear"),
        ),
        pvt_v2("b3", (3, 4, 18, 3), params_m=45.2, flops_g=6.9, top1=83.1),
        pvt_v2("b4", (3, 8, 27, 3), params_m=62.6, flops_g=10.1, top1=83.6),
        pvt_v2("b5", (3, 6, 40, 3), params_m=82.0, flops_g=11.8, top1=83.8, mlp_ratios=(4, 4, 4, 4)),
        twins("pcpvt", "small", pcpvt_arch((3, 4, 6, 3)), params_m=24.1, flops_g=3.7, top1=81.2),
        twins("pcpvt", "base", pcpvt_arch((3, 4, 18, 3)), params_m=43.8, flops_g=6.4, top1=82.7),
        twins("pcpvt", "large", pcpvt_arch((3, 8, 27, 3)), params_m=60.9, flops_g=9.5, top1=83.1),
        twins("svt", "small", svt_arch(64, (2, 2, 10, 4)), params_m=24.0, flops_g=2.8, top1=81.7),
        twins("svt", "base", svt_arch(96, (2, 2, 18, 2)), params_m=56.0, flops_g=8.3, top1=83.2),
        twins("svt", "large", svt_arch(128, (2, 2, 18, 2)), params_m=99.2, flops_g=14.8, top1=83.7),
        video_swin(
            "tiny",
            params_m=28,
            flops_g=87.9,
            torchvision={"in1k_ft_k400": ("Swin3D_T_Weights.KINETICS400_V1", 77.715)},
            official={"in1k_ft_k400": ("swin_tiny_patch244_window877_kinetics400_1k", 78.8)},
            mmaction2={"in1k_ft_k400": ("swin-tiny_in1k_kinetics400", 78.9)},
        ),
        video_swin(
            "small",
            params_m=50,
            flops_g=165.9,
            torchvision={"in1k_ft_k400": ("Swin3D_S_Weights.KINETICS400_V1", 79.521)},
            official={"in1k_ft_k400": ("swin_small_patch244_window877_kinetics400_1k", 80.6)},
            mmaction2={"in1k_ft_k400": ("swin-small_in1k_kinetics400", 80.54)},
        ),
        video_swin(
            "base",
            params_m=88,
            flops_g=281.6,
            torchvision={
                "in22k_ft_k400": ("Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1", 81.643),
                "in1k_ft_k400": ("Swin3D_B_Weights.KINETICS400_V1", 79.427),
            },
            official={
                "in22k_ft_k400": ("swin_base_patch244_window877_kinetics400_22k", 82.7),
                "in1k_ft_k400": ("swin_base_patch244_window877_kinetics400_1k", 80.6),
                "in22k_ft_k600": ("swin_base_patch244_window877_kinetics600_22k", 84.0),
            },
            mmaction2={"in1k_ft_k400": ("swin-base_in1k_kinetics400", 80.57)},
        ),
        video_swin(
            "base",
            window=16,
            params_m=89,
            flops_g=320.6,
            official={
                "k400_ft_ssv2": ("swin_base_patch244_window1677_sthv2", 69.6),
                "in22k_ft_k400": ("swin_base_patch244_window1677_kinetics400_22k", None),  # where the former starts
            },
            alias="video_swin_base_sthv2",
        ),
        video_swin(
            "large",
            params_m=197,
            flops_g=604,
            mmaction2={
                "in22k_ft_k400": ("swin-large_in22k_kinetics400", 83.46),
                "in22k_ft_k700": ("swin-large_in22k_kinetics700", 75.92),
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
