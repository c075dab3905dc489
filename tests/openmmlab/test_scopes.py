"""A configuration's `custom_imports` is all that is needed, in each of the frameworks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
    import importlib
    import sys
    import hvt_backbones
    assert not {name for name in sys.modules if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg")}

    from runner.patches import import_framework
    import_framework("mmaction")
    from mmengine import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import init_default_scope

    config = Config.fromstring('''
    custom_imports = dict(imports=["hvt_backbones.openmmlab"])
    backbone = dict(type="HVTBackbone", name="swin_tiny", embed_dim=8, num_heads=(1, 2, 4, 8), out_indices=(1, 3))
    optim_wrapper = dict(
        optimizer=dict(type="AdamW", lr=0.1),
        constructor="HVTLayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    ''', ".py")
    for scope in ("mmdet", "mmseg", "mmaction"):
        init_default_scope(scope)
        MODELS = importlib.import_module(scope + ".registry").MODELS
        for prefix in ("", "mmengine."):
            backbone = MODELS.build(dict(config.backbone, type=prefix + "HVTBackbone"))
            assert (backbone.channels, backbone.strides) == ((16, 64), (8, 32))
            settings = dict(config.optim_wrapper, constructor=prefix + config.optim_wrapper.constructor)
            assert len(build_optim_wrapper(backbone, settings).param_groups) > 10
        print(scope)
"""


@pytest.mark.slow
def test_custom_imports() -> None:
    command = [sys.executable, "-c", textwrap.dedent(BUILD)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["mmdet", "mmseg", "mmaction"]
