"""What other people's code does that a run must not meet, each with its reason: this is the one place for it.

Importing this module changes timm and the filters of warnings for the process; worker processes that start afresh
import it with the data set.
"""

from __future__ import annotations

import warnings
from typing import Any

from PIL import Image
from timm.data import auto_augment

# of pictures whose pixels are right all the same; none of them names the picture, and each worker repeats them
FALSE_ALARMS = (
    "Corrupt EXIF data",  # cameras and editors write such; the orientation alone is used
    "Truncated File Read",  # within EXIF, too; a truncated picture is an error and not a warning
    "Metadata Warning, tag",
    "Palette images with Transparency",  # the transparency is dropped, as for every picture
    "Image appears to be a malformed MPO file",  # read as the JPEG that it is
    r"Image size \(\d+ pixels\) exceeds limit",  # a large photograph; at twice the limit it is an error, which names it
)
_posterize = auto_augment.posterize


def posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
    """timm's, where 0 bits (and fewer, beyond magnitude 10) are the black picture.

    timm's policies ask for them: `rand-m9-mstd0.5-inc1` in one picture of some hundreds. Pillow gave black until
    version 13, which refuses to.
    """
    if bits_to_keep < 1:
        return image.point([0] * 256 * len(image.getbands()))
    return _posterize(image, bits_to_keep, **settings)


def mend_timm() -> None:
    """Let the policies that timm builds from now on use our `posterize`."""
    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is _posterize:
            auto_augment.NAME_TO_OP[name] = posterize


def silence_false_alarms() -> None:
    """Ignore the warnings of `FALSE_ALARMS` in this process."""
    for beginning in FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=beginning, module=r"PIL\.")


mend_timm()
silence_false_alarms()
