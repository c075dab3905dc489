"""How each code base names the tensors of each family, as tables that read in both directions.

Left in a rule is their key, right is ours, without the `backbone.` that `Classifier` puts before it. `{s}` is the
stage as we count it, `{b}` the block, `{n}` a number, `{p}` weight or bias, `{last}` the last stage.

The names are those of microsoft/Swin-Transformer and the detection and segmentation repositories of its authors,
SwinTransformer/Video-Swin-Transformer, whai362/PVT, Meituan-AutoML/Twins, timm 1.0, mmpretrain 1, mmdetection 3,
mmsegmentation 1, mmaction2 1, torchvision 0.26 and transformers 5 (read also: the files it writes, which keep the names
of version 4).
"""

from __future__ import annotations

from ...errors import WeightsError
from ..rules import Layout
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
    return Layout("hvt", family, anchor, requires, rules=None, wrapper={"classifier": "backbone."}, axes=axes)


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
