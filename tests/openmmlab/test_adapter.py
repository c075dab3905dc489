"""`HVTBackbone`: its arguments, and what it loads."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.runner import load_checkpoint

import hvt_backbones as hvt
from hvt_backbones.openmmlab import HVTBackbone, check_checkpoint
from hvt_backbones.weights.files import save_state_dict

from .models import BACKBONES, backbone_config, build, predict, randomise


class RunsCode:
    """A pickle that leaves a file behind where it is read in full."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def backbone(family: str = "swin", **arguments) -> HVTBackbone:
    return HVTBackbone(**BACKBONES[family][1], drop_path_rate=0.0, **arguments)


def frozen(module: HVTBackbone) -> set[str]:
    return {name for name, parameter in module.model.named_parameters() if not parameter.requires_grad}


def test_wrong_arguments() -> None:
    with pytest.raises(hvt.InputError, match="style is 'mmdet': choose one of openmmlab, official"):
        backbone(style="mmdet")
    with pytest.raises(hvt.InputError, match="frozen_stages is 5: give -1 for none, or 0 to 4"):
        backbone(frozen_stages=5)
    with pytest.raises(hvt.InputError, match="no argument 'embed_dims'"):
        backbone(embed_dims=8)
    with pytest.raises(hvt.WeightsError, match="swin_tiny has no weights 'in21k'"):
        backbone(pretrained="in21k")
    with pytest.raises(hvt.InputError, match="pretrained and init_cfg"):
        backbone(pretrained=True, init_cfg={"type": "Pretrained", "checkpoint": "a.pth"})


WEIGHTS = {"type": "Pretrained", "checkpoint": "a.pth"}
WRONG_KINDS = {
    "a model is chosen by its name, a string; got 3": {"name": 3},
    "style is ['openmmlab']: choose one of openmmlab, official": {"style": ["openmmlab"]},
    "grad checkpointing is 'yes': give True, False, block": {"with_cp": "yes"},
    "max_logits is 0: give a positive whole number": {"max_logits": 0},
    "norm_eval is 1: give True or False": {"norm_eval": 1},
    "frozen_stages is True: give -1 for none, or 0 to 4": {"frozen_stages": True},
    "got 2": {"name": "video_swin_tiny", "depths": 2},
    "weights_key is 'ema' without `pretrained`: give both, or both in init_cfg": {"weights_key": "ema"},
    "weights_key is ['ema']: give a key of the file": {"pretrained": "a.pth", "weights_key": ["ema"]},
    "init_cfg is ['a.pth']: give a dictionary with a `type`": {"init_cfg": ["a.pth"]},
    "init_cfg has no key 'weight_key' for weights: it takes type,": {"init_cfg": {**WEIGHTS, "weight_key": "ema"}},
    "the checkpoint of init_cfg is None: give": {"init_cfg": {"type": "Pretrained"}},
    "the checkpoint of init_cfg is 3: give": {"init_cfg": [{**WEIGHTS, "checkpoint": 3}]},
    "prefix of init_cfg is 3: give a string": {"init_cfg": {**WEIGHTS, "prefix": 3}},
    "weights_key of init_cfg is ['ema']: give a string": {"init_cfg": {**WEIGHTS, "weights_key": ["ema"]}},
}


@pytest.mark.parametrize("said", WRONG_KINDS)
def test_arguments_of_wrong_kinds(said: str) -> None:
    with pytest.raises(hvt.InputError) as caught:
        HVTBackbone(**{"name": "swin_tiny", **WRONG_KINDS[said]})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [{}, {**WEIGHTS, "_scope_": "mmdet", "map_location": "cpu", "prefix": None}], ids=len)
def test_init_cfg_without_a_type_and_with_all_that_mmengine_writes(more: dict, tmp_path: Path) -> None:
    expected = randomise(backbone(), 1).model.state_dict()
    module = backbone(init_cfg={**more, "checkpoint": str(save_state_dict(expected, tmp_path / "weights.pth"))})
    module.init_weights()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in module.model.state_dict().items())


@pytest.mark.parametrize("family", BACKBONES)
def test_frozen_stages(family: str) -> None:
    """The names that mmdetection's Swin freezes, in ours."""
    assert not frozen(backbone(family))
    embedding = {name for name, _ in backbone(family).model.named_parameters() if "stages.0.downsample" in name}
    assert frozen(backbone(family, frozen_stages=0)) == embedding
    module = backbone(family, frozen_stages=2).train()
    stages = ("stages.0.", "stages.1.", "stages.2.downsample.")
    assert frozen(module) == {name for name, _ in module.model.named_parameters() if name.startswith(stages)}
    in_training = [layer.training for stage in module.model.stages for layer in (stage.downsample, stage.blocks)]
    assert in_training == [False, False, False, False, False, True, True, True]
    assert len(frozen(backbone(family, frozen_stages=4))) == len(list(module.parameters()))


def test_frozen_stages_of_numpy() -> None:
    assert frozen(backbone(frozen_stages=np.int64(1))) == frozen(backbone(frozen_stages=1))


def test_frozen_stages_are_those_of_mmdet() -> None:
    theirs = build("retinanet", "swin", ours=False, frozen_stages=2).backbone
    theirs.train()
    numbers = sum(parameter.numel() for parameter in theirs.parameters() if not parameter.requires_grad)
    ours = backbone(frozen_stages=2)
    assert sum(parameter.numel() for parameter in ours.parameters() if not parameter.requires_grad) == numbers


def test_the_position_embedding_is_frozen_with_the_patches() -> None:
    assert "absolute_pos_embed" in frozen(backbone(frozen_stages=0, ape_size=8))


def test_norm_eval() -> None:
    norms = [module for module in backbone(norm_eval=True).train().modules() if isinstance(module, torch.nn.LayerNorm)]
    assert not any(norm.training for norm in norms)
    assert len(norms) > 20
    assert all(norm.training for norm in backbone().train().modules() if isinstance(norm, torch.nn.LayerNorm))


@pytest.mark.parametrize(("with_cp", "recomputed"), [(False, None), (True, "block"), ("stage", "stage")])
def test_checkpointing_is_the_backbones(with_cp: bool | str, recomputed: str | None) -> None:
    assert {stage.recomputed for stage in backbone(with_cp=with_cp).model.stages} == {recomputed}


def test_logits_are_limited_as_the_backbones() -> None:
    limits = [block.attn.max_logits for stage in backbone(max_logits=2**20).model.stages for block in stage.blocks]
    assert set(limits) == {2**20}


def test_outputs_after_the_downsampling() -> None:
    module = backbone(out_after_downsample=True, frozen_stages=2)
    assert module.strides == (8, 16, 32, 32)
    maps = module(torch.randn(1, 3, 64, 96))
    expected = [(c, 64 // s, 96 // s) for c, s in zip(module.channels, module.strides, strict=True)]
    assert [tuple(x.shape[1:]) for x in maps] == expected
    assert {"stages.1.norm.weight", "stages.2.downsample.reduction.weight"} <= set(frozen(module))


def test_maps_are_contiguous() -> None:
    """mmcv's RoIAlign takes channels-last memory for NCHW and gives wrong numbers."""
    assert all(stage.is_contiguous() for stage in backbone()(torch.randn(2, 3, 64, 64)))


def test_a_copy_loads_into_itself() -> None:
    module = backbone()
    twin = copy.deepcopy(module)
    twin.load_state_dict(randomise(backbone()).state_dict())
    assert not torch.equal(next(twin.parameters()), next(module.parameters()))


@pytest.mark.parametrize("layout", ["hvt", "timm", "mmdet"])
@pytest.mark.parametrize("way", ["pretrained", "init_cfg"])
def test_pretrained_takes_any_layout(layout: str, way: str, tmp_path: Path) -> None:
    state = randomise(backbone()).model.state_dict()
    if layout == "timm":  # it has no place for the norms of the first outputs
        absent = tuple(f"stages.{stage}.norm." for stage in range(3))
        state = {key: tensor for key, tensor in state.items() if not key.startswith(absent)}
    path = save_state_dict(hvt.convert_state_dict(state, to=layout), tmp_path / "weights.pth")
    if way == "pretrained":
        module = backbone(pretrained=path)
    else:
        module = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(path)})
    assert not torch.equal(next(module.parameters()), state["stages.0.downsample.proj.weight"])
    module.init_weights()
    loaded = module.model.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_init_cfg_with_a_prefix(tmp_path: Path) -> None:
    teacher, student = randomise(backbone(), 1), randomise(backbone(), 2)
    both = {f"teacher.backbone.{key}": tensor for key, tensor in teacher.state_dict().items()}
    both |= {f"student.backbone.{key}": tensor for key, tensor in student.state_dict().items()}
    path = save_state_dict(both, tmp_path / "both.pth")
    config = {"type": "Pretrained", "checkpoint": str(path), "prefix": "teacher.backbone"}
    module = backbone(init_cfg=config)
    module.init_weights()
    assert torch.equal(next(module.parameters()), next(teacher.parameters()))
    assert module.init_cfg == config
    with pytest.raises(hvt.WeightsError, match="no keys that begin with 'assistant.'"):
        backbone(init_cfg={**config, "prefix": "assistant"}).init_weights()


def test_a_classifier_by_its_prefix_leaves_other_norms_new(tmp_path: Path) -> None:
    classifier = randomise(hvt.Classifier(backbone(out_indices=(3,)).model, 5))
    path = tmp_path / "classifier.pth"
    torch.save({"state_dict": hvt.convert_state_dict(classifier.state_dict(), to="mmpretrain")}, path)
    module = backbone(init_cfg={**WEIGHTS, "checkpoint": str(path), "prefix": "backbone."})
    module.init_weights()
    same = "stages.3.norm.weight"
    assert torch.equal(module.model.state_dict()[same], classifier.backbone.state_dict()[same])


@pytest.mark.parametrize("prefix", [None, "backbone"])
@pytest.mark.parametrize("key", [None, "state_dict_ema"])
def test_one_of_several_sets_of_weights(key: str | None, prefix: str | None, tmp_path: Path) -> None:
    trained, average = randomise(backbone(), 1), randomise(backbone(), 2)
    path, start = tmp_path / "both.pth", f"{prefix}." if prefix else ""
    content = {"state_dict": trained, "state_dict_ema": average}
    torch.save({name: {start + k: t for k, t in m.state_dict().items()} for name, m in content.items()}, path)
    modules = [backbone(init_cfg={**WEIGHTS, "checkpoint": str(path), "prefix": prefix, "weights_key": key})]
    if prefix is None:
        modules.append(backbone(pretrained=path, weights_key=key))
    for module in modules:
        module.init_weights()
        assert torch.equal(next(module.parameters()), next((average if key else trained).parameters()))


@pytest.mark.parametrize("prefix", [None, "backbone"])
def test_the_configuration_says_the_window_of_training(prefix: str | None, tmp_path: Path) -> None:
    """Else a model that is built for testing, without these weights, would divide offsets by another."""
    arguments = {"name": "swinv2_tiny_window8", "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
    trained = hvt.create_backbone(window_size=4, **arguments).state_dict()
    official = hvt.convert_state_dict(trained, to="official", window_size=4)
    path = tmp_path / "window4.pth"
    torch.save({(f"{prefix}." if prefix else "") + key: tensor for key, tensor in official.items()}, path)
    config = {**WEIGHTS, "checkpoint": str(path), "prefix": prefix}
    with pytest.raises(hvt.WeightsError, match="add pretrained_window_size=4 to the backbone"):
        HVTBackbone(window_size=8, init_cfg=config, **arguments).init_weights()
    module = HVTBackbone(window_size=8, pretrained_window_size=4, init_cfg=config, **arguments)
    module.init_weights()
    assert torch.equal(module.model.state_dict()["stages.0.norm.weight"], trained["stages.0.norm.weight"])


def test_other_initialisers_run_before(tmp_path: Path) -> None:
    configs = [{"type": "Constant", "layer": "LayerNorm", "val": 3.0}]
    module = backbone(init_cfg=configs)
    module.init_weights()
    assert (module.model.stages[0].norm.weight == 3).all()


WAYS = {
    "pretrained": lambda path: backbone(pretrained=path).init_weights(),
    "init_cfg": lambda path: backbone(init_cfg={"type": "Pretrained", "checkpoint": path}).init_weights(),
    "check_checkpoint": check_checkpoint,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", ["system", "getattr"])
def test_a_file_that_would_run_code_is_refused(way: str, call: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    program = (
        RunsCode(os.system, f"touch {trace}") if call == "system" else RunsCode(getattr, HistoryBuffer, "__init__")
    )
    path = str(tmp_path / "evil.pth")
    torch.save({"state_dict": backbone().model.state_dict(), "meta": program}, path)
    with pytest.raises(hvt.WeightsError, match=r"needs the code of '(posix.system|builtins.getattr)'"):
        WAYS[way](path)
    assert not trace.exists()


def test_what_mmengine_writes_is_accepted(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("test_adapter")
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("best", np.float32(0.5))
    module = backbone()
    optimizer = torch.optim.AdamW(module.parameters())
    content = {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("a", "b"), "palette": np.zeros((2, 3), dtype=np.uint8)}},
        "state_dict": module.state_dict(),
        "message_hub": hub.state_dict(),
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"base_values": [1.0], "last_step": 3}],
    }
    path = tmp_path / "epoch_1.pth"
    torch.save(content, path)
    assert check_checkpoint(path) == path
    backbone(pretrained=path).init_weights()


def load(module: torch.nn.Module, state_dict: dict[str, torch.Tensor], path: Path, caplog) -> str:
    """Load as MMEngine does, and return what it logged."""
    torch.save({"state_dict": state_dict}, path)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.clear()
    try:
        load_checkpoint(module, str(path), logger=logger)
    finally:
        logger.removeHandler(caplog.handler)
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def test_what_does_not_fit_is_reported(tmp_path: Path, caplog) -> None:
    theirs = randomise(build("fpn", "swin", ours=False)).state_dict()
    ours = build("fpn", "swin", ours=True)
    assert load(ours, theirs, tmp_path / "a.pth", caplog) == ""
    changed = {key: tensor for key, tensor in theirs.items() if key != "backbone.norm2.weight"}
    changed["backbone.stages.0.extra"] = torch.zeros(1)
    changed["backbone.norm1.weight"] = torch.zeros(5)
    said = load(ours, changed, tmp_path / "b.pth", caplog)
    assert "missing keys in source state_dict: backbone.model.stages.2.norm.weight\n" in said
    assert "unexpected key in source state_dict: backbone.stages.0.extra\n" in said
    assert "size mismatch for backbone.model.stages.1.norm.weight" in said


def test_another_backbone_is_reported(tmp_path: Path, caplog) -> None:
    ours = build("fpn", "swin", ours=True)
    before = copy.deepcopy(ours.backbone.state_dict())
    said = load(ours, build("fpn", "twins_svt", ours=False).state_dict(), tmp_path / "a.pth", caplog)
    assert "the weights are of the family twins_svt (mmdet layout), the model is a SwinTransformer" in said
    assert "missing keys in source state_dict: backbone.model.stages.0.downsample.proj.weight" in said
    torch.testing.assert_close(ours.backbone.state_dict(), before, rtol=0, atol=0)


def test_position_tables_are_resized(tmp_path: Path, caplog) -> None:
    theirs = randomise(build("fpn", "swin", ours=False))
    ours = build("fpn", "swin", ours=True, window_size=6)
    assert load(ours, theirs.state_dict(), tmp_path / "a.pth", caplog) == ""
    assert ours.backbone.model.stages[0].blocks[0].attn.position_bias.table.shape == (121, 1)
    of_window_6 = build("fpn", "swin", ours=True, window_size=6)
    hvt.load_weights(of_window_6.backbone.model, theirs.backbone.state_dict())
    torch.testing.assert_close(ours.backbone.state_dict(), of_window_6.backbone.state_dict())


@pytest.mark.parametrize("family", BACKBONES)
def test_checkpoints_of_the_official_repositories(family: str, tmp_path: Path, caplog) -> None:
    """Their detectors and segmentors have the frameworks' heads around backbones in their own names."""
    source = randomise(build("fpn", family, ours=True, style="official"))
    state = source.state_dict()
    official = hvt.convert_state_dict(source.backbone.model.state_dict(), to="official")
    whole = {key: tensor for key, tensor in state.items() if not key.startswith("backbone.")}
    whole |= {f"backbone.{key}": tensor for key, tensor in official.items()}
    ours = build("fpn", family, ours=True, style="official")
    assert load(ours, whole, tmp_path / "official.pth", caplog) == ""
    images = torch.randn(1, 3, 61, 75)
    torch.testing.assert_close(predict(ours, images), predict(source, images), rtol=0, atol=0)
    if family != "swin":
        said = load(build("fpn", family, ours=True), whole, tmp_path / "official.pth", caplog)
        assert "build the backbone with style='official'" in said


@pytest.mark.parametrize("family", ["twins_pcpvt", "twins_svt"])
def test_what_is_known_to_be_unused_is_no_stranger(family: str, tmp_path: Path) -> None:
    """The official detectors of Twins have the classifier's norm and head in their backbones."""
    source = randomise(build("fpn", family, ours=True, style="official"))
    unused = {"norm.weight": (64,), "norm.bias": (64,), "head.weight": (10, 64), "head.bias": (10,)}
    official = hvt.convert_state_dict(source.backbone.model.state_dict(), to="official")
    official |= {key: torch.zeros(shape) for key, shape in unused.items()}
    whole = {key: tensor for key, tensor in source.state_dict().items() if not key.startswith("backbone.")}
    whole |= {f"backbone.{key}": tensor for key, tensor in official.items()}
    torch.save({"meta": {}, "state_dict": whole}, tmp_path / "official.pth")
    ours = build("fpn", family, ours=True, style="official")
    load_checkpoint(ours, str(tmp_path / "official.pth"), strict=True)
    torch.testing.assert_close(ours.state_dict(), source.state_dict(), rtol=0, atol=0)


def test_style_is_that_of_create_backbone() -> None:
    for family, (_, own) in BACKBONES.items():
        official, plain = backbone(family, style="official"), hvt.create_backbone(**own, drop_path_rate=0.0)
        images = torch.randn(1, 3, 61, 75)
        plain.load_state_dict(randomise(official.model).state_dict())
        torch.testing.assert_close(official(images), plain(images))


def test_one_training_step_of_a_detector() -> None:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    model = build("retinanet", "swin", ours=True, frozen_stages=1, with_cp=True)
    assert model.train() is model
    boxes = InstanceData(bboxes=torch.tensor([[4.0, 4.0, 40.0, 50.0]]), labels=torch.tensor([1]))
    size = (64, 64)
    info = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
    losses = model(torch.randn(1, 3, 64, 64), [DetDataSample(metainfo=info, gt_instances=boxes)], mode="loss")
    model.parse_losses(losses)[0].backward()
    assert backbone_config("swin", ours=True)["type"] == type(model.backbone).__name__
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
