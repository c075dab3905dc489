"""Our models in timm's registry: what timm's own tests ask of a model, and its optimisers, checkpoints and training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import FeatureInfo
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import hvt_backbones as hvt
import hvt_backbones.timm as registry
from hvt_backbones.model_file import data_config
from hvt_backbones.variants import VARIANTS
from hvt_backbones.weights import sources

from .families import TINY, randomise, tiny, tiny_classifier
from .test_weights_convert import PEERS, randomised

# a small variant of each family, and what makes it tiny
NAMES = {
    "hvt_swin_tiny": "swin",
    "hvt_swinv2_tiny_window8": "swinv2",
    "hvt_pvt_v2_b0": "pvt_v2",
    "hvt_pvt_v2_b2_li": "pvt_v2_linear",
    "hvt_twins_pcpvt_small": "twins_pcpvt",
    "hvt_twins_svt_small": "twins_svt",
}
every_family = pytest.mark.parametrize("name", NAMES)
CHANNELS = {name: [8, 16, 32, 64] if "swin" in name else [8, 16, 24, 32] for name in NAMES}


def create(name: str, **arguments: Any) -> nn.Module:
    """By timm, tiny, with a random value in every parameter."""
    return randomise(timm.create_model(name, **{**TINY[NAMES[name.partition(".")[0]]].keywords, **arguments}))


def picture(*size: int, batch: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(4))


def test_every_image_model_is_there_with_its_weights() -> None:
    images = [variant for variant in VARIANTS.values() if variant.frames is None]
    assert set(timm.list_models("hvt_*")) == {f"hvt_{variant.name}" for variant in images}
    with_weights = {f"hvt_{variant.name}.{tag}" for variant in images for tag in variant.tags}
    assert set(timm.list_pretrained("hvt_*")) == with_weights
    for variant in images:
        for tag in variant.tags:
            cfg, published = timm.get_pretrained_cfg(f"hvt_{variant.name}.{tag}"), variant.published(tag)
            assert (cfg.num_classes, cfg.license, cfg.hf_hub_filename) == (
                published.num_classes, published.license, published.filename,
            )  # fmt: skip
            assert published.source in (f"hf-hub:{cfg.hf_hub_id}", cfg.url)
    assert timm.get_pretrained_cfg("hvt_swin_tiny").tag == "in1k"
    assert registry.hvt_swin_tiny.__module__ == "hvt_backbones.timm"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(registry.IMAGE_VARIANTS))
def test_the_configuration_is_the_models(name: str) -> None:
    """On the meta device, which needs no memory: names, channels, and the last map at the stated size."""
    model = timm.create_model(name, device="meta")
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert {cfg["classifier"] + ".weight", cfg["first_conv"] + ".weight"} < keys
    assert (model.num_classes, model.in_chans) == (cfg["num_classes"], cfg["input_size"][0])
    if max(cfg["input_size"]) <= 256:
        features = model.forward_features(torch.zeros(1, *cfg["input_size"], device="meta"))
        assert features.shape == (1, model.num_features, *cfg["pool_size"])


@every_family
def test_preprocessing_is_ours(name: str) -> None:
    found = timm.data.resolve_model_data_config(create(name))
    assert found == vars(data_config(name.removeprefix("hvt_")))
    torchvision = timm.data.resolve_model_data_config(create("hvt_swin_tiny.torchvision_in1k"))
    assert torchvision["crop_pct"] == pytest.approx(224 / 232)


@every_family
def test_forward_and_backward(name: str) -> None:
    model = create(name, num_classes=42).train()
    for x in (picture(*model.default_cfg["input_size"][1:]), picture(70, 101, batch=2)):
        model.zero_grad()
        logits = model(x)
        assert logits.shape == (len(x), 42)
        logits.square().mean().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@every_family
def test_head(name: str) -> None:
    model, x = create(name, num_classes=6).eval(), picture(64, 64)
    maps = model.forward_features(x)
    pooled = model.forward_head(maps, pre_logits=True)
    assert maps.shape == (1, model.num_features, 2, 2)
    assert pooled.shape == (1, model.head_hidden_size)
    assert model.get_classifier().out_features == 6
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))
    model.requires_grad_(False).reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert model.num_classes == 0
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), maps)
    model.to(torch.float64).reset_classifier(3, "avg")
    assert model(x.double()).dtype == torch.float64
    assert not any(module.training for module in model.modules())
    for pool, shape in (("", (1, model.num_features, 2, 2)), ("avg", (1, model.num_features))):
        assert create(name, num_classes=0, global_pool=pool)(x).shape == shape


def test_dropout_is_timms() -> None:
    model, x = create("hvt_swin_tiny", drop_rate=0.5, proj_drop_rate=0.25, drop_path_rate=0.0), picture(64, 64)
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.25}
    maps = model.forward_features(x)
    pooled = maps.flatten(2).mean(-1)
    dropped = model.train().forward_head(maps, pre_logits=True)
    assert (dropped == 0).any()
    torch.testing.assert_close(dropped[dropped != 0], 2 * pooled[dropped != 0])
    torch.testing.assert_close(model.eval().forward_head(maps), model.head(pooled))


@every_family
@pytest.mark.parametrize("out_indices", [None, (0, 1, 2, 3), (1, 3), (0,), (-1,), (-3, -1), 2], ids=str)
def test_features(name: str, out_indices: Any) -> None:
    model = create(name, features_only=True, out_indices=out_indices, in_chans=2).eval()
    stages = {None: [0, 1, 2, 3], 2: [2, 3]}.get(out_indices) or [i % 4 for i in out_indices]
    assert model.feature_info.channels() == [CHANNELS[name][i] for i in stages]
    assert model.feature_info.reduction() == [4 * 2**i for i in stages]
    assert model.feature_info.channels([0, 3]) == [CHANNELS[name][i] for i in (0, 3)]
    assert model.feature_info.module_name() == [f"backbone.stages.{i}" for i in stages]
    assert all(model.get_submodule(module) for module in model.feature_info.module_name())
    maps = model(picture(96, 64, channels=2))
    assert isinstance(maps, list)
    assert [y.shape for y in maps] == [(1, CHANNELS[name][i], 24 >> i, 16 >> i) for i in stages]
    dense = hvt.create_backbone(
        name.removeprefix("hvt_"), in_chans=2, out_indices=stages, **TINY[NAMES[name]].keywords
    ).eval()
    dense.load_state_dict(model.backbone.state_dict())
    torch.testing.assert_close(maps, list(dense(picture(96, 64, channels=2))))
    assert "classifier" not in model.default_cfg


@every_family
def test_features_of_the_meta_device_and_of_other_shapes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    short = {key: value[:2] if isinstance(value, tuple) else value for key, value in TINY[NAMES[name]].keywords.items()}
    model = timm.create_model(name, features_only=True, out_indices=(-1,), dtype=torch.float64, **short)
    assert model(picture(40, 40).double())[0].shape == (1, 16, 5, 5)
    assert model.feature_info.channels() == [16]


@every_family
def test_intermediates(name: str) -> None:
    model, x = create(name).eval(), picture(97, 130)
    last, maps = model.forward_intermediates(x)
    torch.testing.assert_close(last, model.forward_features(x))
    info = FeatureInfo(model.feature_info, 4)
    for y, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert y.shape[:2] == (1, channels)
        assert all(abs(side - n / reduction) < 2 for side, n in zip(y.shape[2:], x.shape[2:], strict=True))
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    torch.testing.assert_close(normed[:-1], maps[:-1])
    torch.testing.assert_close(normed[-1], last)
    assert torch.equal(maps[-1], last) == model.backbone.norm_feeds_next_stage
    for chosen, stages in ((2, [2, 3]), ([0, -1], [0, 3]), ((1,), [1])):
        some = model.forward_intermediates(x, indices=chosen, intermediates_only=True)
        torch.testing.assert_close(some, [maps[i] for i in stages])
    early, (second,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(early, second)
    torch.testing.assert_close(second, maps[1])
    getter = FeatureGetterNet(model, out_indices=(1, 2))
    torch.testing.assert_close(getter(x), maps[1:3])


@pytest.mark.parametrize("peer_name", [name for name in PEERS if name.startswith("timm")])
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normed"])
def test_intermediates_are_those_of_timms_models(peer_name: str, norm: bool) -> None:
    """But for Twins' last one, which timm gives before its norm where none is asked for."""
    case = PEERS[peer_name]
    peer = randomised(case.peer())
    model = registry.TimmClassifier(hvt.Classifier(case.ours(), peer.num_classes).eval(), {})
    hvt.load_weights(model, peer.state_dict())
    x = picture(64, 64)
    last, maps = model.forward_intermediates(x, norm=norm)
    theirs_last, theirs = peer.forward_intermediates(x, norm=norm)
    assert len(maps) == len(theirs)
    skipped = 1 if model.backbone.family.startswith("twins") and not norm else 0
    for ours, other in list(zip(maps, theirs, strict=True))[: len(maps) - skipped]:
        assert (ours - other).abs().max() < 1e-4 * other.abs().max()
    if theirs_last.shape == last.shape:
        assert (last - theirs_last).abs().max() < 1e-4 * last.abs().max()


@every_family
@pytest.mark.parametrize("kind", [{}, {"features_only": True}], ids=["classifier", "features"])
def test_checkpointing(name: str, kind: dict[str, bool]) -> None:
    model, x = create(name, drop_path_rate=0.0, **kind).train(), picture(64, 64)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        maps = model(x)
        sum(y.square().mean() for y in (maps if isinstance(maps, list) else [maps])).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing(enable=True)
    assert all(stage.recomputed == "block" for stage in model.backbone.stages)
    torch.testing.assert_close(gradients(), plain)
    model.set_grad_checkpointing(False)
    assert not any(stage.recomputed for stage in model.backbone.stages)


def settings(groups: Iterable[dict[str, Any]], model: nn.Module) -> dict[str, tuple[float, float]]:
    """Parameter name -> (weight decay, factor on the learning rate)."""
    of = {p: (group["weight_decay"], group.get("lr_scale", 1.0)) for group in groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters() if p in of}


def of_simmim(family: str) -> hvt.SimMIM:
    return hvt.SimMIM(TINY[family](out_indices=(3,)))


@pytest.mark.parametrize(
    ("make", "family"),
    [(make, family) for make in (tiny, tiny_classifier) for family in TINY] + [(of_simmim, "swin")],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("layer_decay", [None, 0.8])
def test_timms_optimiser_has_our_groups(make: Any, family: str, layer_decay: float | None) -> None:
    model = make(family)
    next(model.parameters()).requires_grad_(False)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    ours = settings(model.param_groups(weight_decay=0.05, layer_decay=layer_decay or 1.0), model)
    theirs = settings(optimizer.param_groups, model)
    assert theirs.keys() == ours.keys()
    assert len(theirs) == len(list(model.parameters())) - 1
    for name, expected in ours.items():
        assert theirs[name] == pytest.approx(expected), name
    if family == "swin":
        assert {theirs[name][0] for name in theirs if "position_bias" in name} == {0.0}
    if layer_decay:
        assert len({scale for _, scale in theirs.values()}) == 8 + (make is not tiny)  # 7 blocks, stem, head


@every_family
def test_coarse_groups_are_stages(name: str) -> None:
    model = create(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for parameter, group in groups.items():
        stem = "stages.0.downsample" in parameter
        expected = 5 if parameter.startswith("head") else 0 if stem else 1 + int(parameter.split(".")[2])
        assert group == expected, parameter


def test_pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a tag, and by the idiom of timm's train.py for a file; features, other classes and other channels."""
    asked = []

    def fetch(source: str, **_: Any) -> Path:
        if Path(source).exists():
            return Path(source)
        asked.append(source)
        return tmp_path / "weights.pth"

    monkeypatch.setattr(sources, "fetch", fetch)
    trained = create("hvt_swin_tiny.in22k").eval()
    assert trained.num_classes == 21841
    torch.save(hvt.convert_state_dict(trained.state_dict(), to="official"), tmp_path / "weights.pth")
    x, arguments = picture(64, 64), TINY["swin"].keywords
    loaded = timm.create_model("hvt_swin_tiny.in22k", pretrained=True, **arguments).eval()
    assert asked == ["hf-hub:timm/swin_tiny_patch4_window7_224.ms_in22k"]
    torch.testing.assert_close(loaded(x), trained(x))
    tuned = timm.create_model("hvt_swin_tiny", pretrained=True, num_classes=3, in_chans=1, **arguments)
    assert asked[1] == "hf-hub:timm/swin_tiny_patch4_window7_224.ms_in1k"
    assert tuned(picture(64, 64, channels=1)).shape == (1, 3)
    file = {"file": str(tmp_path / "weights.pth"), "num_classes": -1}
    other = timm.create_model("hvt_swin_tiny", pretrained=True, pretrained_cfg_overlay=file, **arguments).eval()
    assert other.num_classes == 1000
    torch.testing.assert_close(other.forward_features(x), trained.forward_features(x))
    features = timm.create_model("hvt_swin_tiny", pretrained=True, features_only=True, output_norm=False, **arguments)
    x = picture(160, 160)  # no map is so small that a dense model pads it where a classifier shrinks its windows
    torch.testing.assert_close(features.eval()(x), trained.forward_intermediates(x, intermediates_only=True))


def test_a_folder_that_timm_saves(tmp_path: Path) -> None:
    model = create("hvt_pvt_v2_b0", num_classes=4).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=TINY["pvt_v2"].keywords)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(picture(64, 64)), model(picture(64, 64)))


REFUSED = {
    "not of the model": ({"sr_ratio": 2}, "swin_tiny has no argument 'sr_ratio'"),
    "a stride": ({"features_only": True, "output_stride": 8}, "output_stride"),
    "maps of a classifier": ({"out_indices": (0,)}, "give features_only=True"),
    "a stage that is not there": ({"features_only": True, "out_indices": (0, 4)}, "out_indices is \\(0, 4\\)"),
    "no stage": ({"features_only": True, "out_indices": ()}, "out_indices is \\(\\)"),
    "too many of the last": ({"features_only": True, "out_indices": 5}, "out_indices is 5"),
    "pooling": ({"global_pool": "max"}, "global_pool is 'max'"),
    "classes without pooling": ({"global_pool": ""}, "global_pool is ''"),
    "a rate": ({"drop_rate": 1.5}, "drop_rate is 1.5"),
    "a cache": ({"cache_dir": "here"}, "set HF_HOME"),
    "tensors": ({"pretrained": True, "pretrained_cfg_overlay": {"state_dict": {"a": 1}}}, "load_weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_in_one_line(case: str) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(hvt.InputError, match=words) as error:
        timm.create_model("hvt_swin_tiny", **arguments)
    assert "\n" not in str(error.value)


def test_intermediates_and_weights_that_are_not_there() -> None:
    with pytest.raises(hvt.InputError, match="NCHW"):
        create("hvt_swin_tiny").forward_intermediates(picture(64, 64), output_fmt="NLC")
    with pytest.raises(hvt.InputError, match="indices is \\[9\\]"):
        create("hvt_swin_tiny").forward_intermediates(picture(64, 64), indices=[9])
    with pytest.raises(hvt.WeightsError, match="no weights of swinv2_huge"):
        timm.create_model("hvt_swinv2_huge", pretrained=True, device="meta")


@pytest.mark.slow
def test_training_as_timms_train_py_does(tmp_path: Path) -> None:
    """timm's train.py is in none of its packages: its factories in its order, on the digits, then validate.py's."""
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy

    from classification.data.digits import lay_out_digits

    lay_out_digits(tmp_path / "digits")
    tiny_one = {**TINY["swin"].keywords, "embed_dim": 16}
    args = argparse.Namespace(model="hvt_swin_tiny", img_size=32)
    model = timm.create_model(
        args.model, pretrained=False, in_chans=3, num_classes=10, drop_rate=0.0, drop_path_rate=None,
        drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path=None,
        **tiny_one,
    )  # fmt: skip
    model.set_grad_checkpointing(enable=True)
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.1)  # --head-init-scale
    config = resolve_data_config(vars(args), model=model)
    assert config["input_size"] == (3, 32, 32)

    def loader(split: str, **options: Any) -> Any:
        data = create_dataset("", root=tmp_path / "digits", split=split, is_training=split == "train")
        keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
        shared = {key: config[key] for key in keys} | {"num_workers": 0, "persistent_workers": False}
        return create_loader(data, batch_size=64, device=torch.device("cpu"), **shared, **options)

    training = loader("train", is_training=True, no_aug=True)
    evaluation = loader("val", is_training=False)
    optimizer = create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.9)
    ema = ModelEmaV3(model, decay=0.8)
    scheduler, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=3, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=len(training)
    )
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=tmp_path, recovery_dir=tmp_path)
    loss_fn, scaler, updates = nn.CrossEntropyLoss(), NativeScaler(device="cpu"), 0

    def top1(of: nn.Module) -> float:
        meter = AverageMeter()
        with torch.inference_mode():
            for images, labels in evaluation:
                meter.update(accuracy(of.eval()(images), labels)[0].item(), len(labels))
        return meter.avg

    assert math.isclose(top1(model), 10, abs_tol=12)
    for epoch in range(epochs):
        for images, labels in training:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_fn(model.train()(images), labels)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            ema.update(model)
            updates += 1
            scheduler.step_update(num_updates=updates)
        best, _ = saver.save_checkpoint(epoch, metric=top1(ema.module))
    assert best > 60

    validated = timm.create_model(
        args.model, num_classes=10, checkpoint_path=tmp_path / "model_best.pth.tar", **tiny_one
    )
    assert top1(validated) == pytest.approx(best)
    ours = hvt.create_classifier("swin_tiny", num_classes=10, pretrained=tmp_path / "last.pth.tar", **tiny_one)
    assert top1(ours) == pytest.approx(top1(model))
    resumed = timm.create_model(args.model, num_classes=10, **tiny_one)
    timm.models.resume_checkpoint(resumed, tmp_path / "last.pth.tar", create_optimizer_v2(resumed, layer_decay=0.9))
    assert top1(resumed) == pytest.approx(top1(model))
