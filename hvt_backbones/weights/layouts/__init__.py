"""How each code base names the tensors of each family, as tables that read in both directions.

Left in a rule is their key, right is ours, without the `backbone.` that `Classifier` puts before it. `{s}` is the
stage as we count it, `{b}` the block, `{n}` a number, `{p}` weight or bias, `{last}` the last stage.

The names are those of microsoft/Swin-Transformer and the detection and segmentation repositories of its authors,
SwinTransformer/Video-Swin-Transformer, whai362/PVT, Meituan-AutoML/Twins, timm 1.0, mmpretrain 1, mmdetection 3,
mmsegmentation 1, mmaction2 1, torchvision 0.26 and transformers 5 (read also: the files it writes, which keep the names
of version 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ...errors import WeightsError
from ..keymap import Layout
from ..report import some
from .pvt_v2 import PVT_V2
from .swin import SWIN, SWINV2
from .twins import TWINS
from .video_swin import VIDEO_SWIN

# family -> keys, in our own layout, that no other family has together
OURS = {
    "swinv2": ("attn.logit_scale",),
    "swin": ("attn.position_bias.table",),
    "video_swin": ("attn.position_bias.table",),
    "pvt_v2": ("mlp.dwconv.weight",),
    "twins_svt": ("attn.qkv.weight", "position.weight"),
    "twins_pcpvt": ("attn.q.weight", "position.weight"),
}


def our_layout(family: str, anchor: str, requires: tuple[str, ...] = ()) -> Layout:
    """The layout of this library's own models: every key stays as it is."""
    axes = 3 if family.startswith("video") else 2
    return Layout(
        "hvt",
        family,
        anchor,
        requires,
        rules=None,
        wrapper=dict.fromkeys(("classifier", "simmim"), "backbone."),
        axes=axes,
    )


ALL = [
    *(
        our_layout(family, "stages.0.downsample.proj.weight", tuple(f"stages.0.blocks.0.{key}" for key in keys))
        for family, keys in OURS.items()
    ),
    *SWIN,
    *SWINV2,
    *PVT_V2,
    *TWINS,
    *VIDEO_SWIN,
]
ALIASES = {"mmseg": "mmdet"}
# the names that `layout=` and `to=` take
LAYOUTS = ("hvt", "official", "timm", "mmpretrain", "mmdet", "mmseg", "mmaction2", "torchvision", "huggingface")


def canonical_name(name: str) -> str:
    """The name of a layout's table.

    Raises:
        WeightsError: there is no such layout.
    """
    if name not in LAYOUTS:
        raise WeightsError(f"no layout {name!r}: choose one of {', '.join(LAYOUTS)}")
    return ALIASES.get(name, name)


def find_layout(name: str, family: str) -> Layout:
    """The table that writes `family` in the layout `name`.

    Raises:
        WeightsError: there is no such layout, or that code base does not have the family.
    """
    name = canonical_name(name)
    written = {layout.name: layout for layout in ALL if layout.family == family and not layout.reads_only}
    if name not in written:
        raise WeightsError(f"layout {name!r} does not have the family {family}: it has {', '.join(written)}")
    return written[name]


def recognise(tensors: Mapping[str, Tensor], name: str = "auto", layouts: Sequence[Layout] = ALL) -> tuple[Layout, str]:
    """The layout of a state dict by its keys, and the prefix before those of the backbone ("" for none).

    Raises:
        WeightsError: no layout has such keys, or the prefix is not unique.
    """
    if name != "auto":
        name = canonical_name(name)
        layouts = [layout for layout in layouts if layout.name == name]
    found = {
        (layout, prefix): _is_marked(layout, prefix, tensors)
        for layout in layouts
        for prefix in sorted(key.removesuffix(layout.anchor) for key in tensors if key.endswith(layout.anchor))
        if (not prefix or prefix.endswith(".")) and all(prefix + key in tensors for key in layout.requires)
        # the keys of video are those of images, the kernel is not
        if (tensors[prefix + layout.anchor].dim() == 5) == (layout.axes == 3)
    }
    # marks tell layouts apart that share their other keys; a layout that was named needs no telling apart
    chosen = [match for match, marked in found.items() if marked] or (list(found) if name != "auto" else [])
    if not chosen:
        wanted = f"not in the {name} layout" if name != "auto" else f"in none of the layouts {', '.join(LAYOUTS)}"
        given = some(sorted(tensors)) if tensors else "there are none"
        raise WeightsError(f"the keys are {wanted} of Swin, SwinV2, PVTv2, Twins or Video Swin: {given}")
    prefixes = sorted({prefix for _, prefix in chosen})
    if len(prefixes) > 1:
        raise WeightsError(
            f"the weights hold {len(prefixes)} backbones, under {', '.join(repr(prefix) for prefix in prefixes)}: "
            "pass the keys of one of them"
        )
    return chosen[0]


def _is_marked(layout: Layout, prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    around = around_of(prefix)
    marked = not layout.marks or any(prefix + key in tensors or around + key in tensors for key in layout.marks)
    return marked and not any(prefix + key in tensors for key in layout.unlike)


def around_of(prefix: str) -> str:
    """The prefix of the module that holds the backbone."""
    return prefix.rpartition(".")[0].rpartition(".")[0] + "." if prefix.count(".") > 1 else ""
