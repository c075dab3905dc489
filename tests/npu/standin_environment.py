"""How a process gets the stand-in NPU: by its environment, before it imports torch."""

from __future__ import annotations

import os
from pathlib import Path

STANDIN = Path(__file__).with_name("standin")
ROOT = STANDIN.parents[2]


def standin_environment(devices: int = 2) -> dict[str, str]:
    """The environment for a subprocess in which `import torch` also loads the stand-in, as it does the real torch_npu.

    Args:
        devices: how many NPUs there are; 0 for a machine with torch_npu and no NPU.
    """
    paths = [str(STANDIN), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "NPU_STANDIN_DEVICES": str(devices),
        "OMP_NUM_THREADS": "1",
    }
