"""The backbones in mmdetection, mmsegmentation and mmaction2, under one name in MMEngine's root registry.

A configuration of any of them says

    custom_imports = dict(imports=["hvt_backbones.openmmlab"])
    model = dict(backbone=dict(type="HVTBackbone", name="swin_tiny", pretrained=True, out_indices=(0, 1, 2, 3)))
    optim_wrapper = dict(
        optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
        constructor="HVTLayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )

MMEngine's own constructor does too, with the rules that are written for a framework's own backbone: parts of names in
`paramwise_cfg` (`custom_keys`, or the keys of mmaction2's constructor), such as `relative_position_bias_table`, are
taken for the parameters of the backbone that they mean. In our names they are

    custom_keys={"absolute_pos_embed": dict(decay_mult=0.0), "position_bias": dict(decay_mult=0.0),
                 "logit_scale": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}

These four mean all that is so named here. Any other key means in the backbone what it fits among the names of the
framework's own one, and only if it fits nothing there, what it fits among ours, then among those of other code bases:
`stages.0.downsample` is mmdetection's, the layer after Swin's stage 0, which is `model.stages.1.downsample` here. A key
with `model.` before the rest of the name, as in `backbone.model.stages.0`, is ours. Where a key fits other parameters
in our names, the log says so. Keys mean the rest of the model as always, whether or not they fit the backbone.

`custom_hooks = [dict(type="HVTResumeHook")]` lets `resume` go on with a run that a framework's own backbone started.
"""

from .backbone import HVTBackbone, check_checkpoint
from .optimizer import HVTLayerDecayOptimWrapperConstructor
from .resume import HVTResumeHook

__all__ = ["HVTBackbone", "HVTLayerDecayOptimWrapperConstructor", "HVTResumeHook", "check_checkpoint"]
