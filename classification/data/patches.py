"""What timm does that a run must not meet, or not as slowly, with its reason: this is the one place for it.

Importing this module changes timm and the filters of warnings for the process; worker processes that start afresh
import it with the data set.
"""

from __future__ import annotations

from typing import Any

from PIL import Image
from timm.data import auto_augment

from hvt_backbones.images import silence_false_alarms

from .slides import Sliding

_posterize = auto_augment.posterize


def posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """timm's, where 0 bits (and fewer, beyond magnitude 10) are the black picture.

    timm's policies ask for them: `rand-m9-mstd0.5-inc1` in one picture of some hundreds. Pillow gave black until
    version 13, which refuses to.
    """
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return _posterize(image, bits_to_keep, **settings)


for _name, _operation in auto_augment.NAME_TO_OP.items():
    if _operation is _posterize:
        auto_augment.NAME_TO_OP[_name] = posterize  # in the policies that timm builds from now on
    elif _name.startswith(("Shear", "Translate")):
        auto_augment.NAME_TO_OP[_name] = Sliding(_operation)  # type: ignore[assignment]  # it is called alike
silence_false_alarms()
