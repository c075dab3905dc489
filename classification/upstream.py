"""What other people's code does that a run must not meet, each with its reason: this is the one place for it.

Importing this module changes timm and the filters of warnings for the process; worker processes that start afresh
import it with the data set.
"""

from __future__ import annotations

import warnings
from typing import Any

from PIL import Image
from timm.data import auto_augment

# (module, beginning) of warnings about pictures whose pixels are right all the same: what is not is an error. None of
# them names the picture, and each worker repeats them
FALSE_ALARMS = (
    (r"PIL\.TiffImagePlugin", ""),  # malformed metadata, EXIF's of a JPEG too: the orientation alone is of use
    (r"PIL\.Image", "Palette images with Transparency"),  # which is dropped, as of every picture
    (r"PIL\.Image", r"Image size \(\d+ pixels\) exceeds limit"),  # a large photograph; twice the limit is an error
    (r"PIL\.JpegImagePlugin", "Image appears to be a malformed MPO file"),  # read as the JPEG that it is
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
    for module, beginning in FALSE_ALARMS:
        warnings.filterwarnings("ignore", message=beginning, module=module)


mend_timm()
silence_false_alarms()
