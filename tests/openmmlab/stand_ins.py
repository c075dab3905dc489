"""Stand-ins for what the frameworks import although nothing here uses it; import this before them."""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

IMGAUG = ("", ".augmenters", ".augmentables", ".augmentables.lines", ".augmentables.segmaps")

if importlib.util.find_spec("imgaug") is None:
    sys.modules.update({f"imgaug{name}": MagicMock() for name in IMGAUG})
# missing in the published package
sys.modules["mmaction.models.localizers.drn"] = MagicMock()
sys.modules["mmaction.models.localizers.drn.drn"] = MagicMock()
# needs an older transformers
sys.modules["mmaction.models.multimodal"] = MagicMock(__all__=[])
