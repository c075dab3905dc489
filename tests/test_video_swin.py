"""Video Swin beside what holds for every family: tubes, inflation, torchvision's model, other windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import PatchMerging, SwinTransformer3d

import hvt_backbones as hvt
from hvt_backbones.cli import main
from hvt_backbones.weights import sources
from hvt_backbones.weights.files import read_weights

from .families import images, randomise, tiny, tiny_classifier

SIZES = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}


def image_model(**more) -> hvt.Classifier:
    backbone = hvt.SwinTransformer(**{**SIZES, "window_size": 4, "out_indices": (1,), **more})
    return randomise(hvt.Classifier(backbone, 5)).eval()


def video_model(**more) -> hvt.VideoSwinTransformer:
    return hvt.VideoSwinTransformer(**{**SIZES, "window_size": (2, 4, 4), "out_indices": (1,), **more}).eval()


def clips(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("length", [1, 2, 3, 16])
def test_clips_of_any_length(length: int) -> None:
    model = tiny("video_swin").eval()
    maps = model(torch.randn(1, 3, length, 40, 36))
    assert {x.shape[2] for x in maps} == {-(-length // 2)}
    assert all(x.isfinite().all() for x in maps)


def test_what_is_no_clip() -> None:
    with pytest.raises(hvt.InputError, match=r"shape \(1, 3, 0, 40, 40\): there is nothing in them"):
        tiny("video_swin")(torch.zeros(1, 3, 0, 40, 40))
    with pytest.raises(hvt.InputError, match=r"expected clips of shape \(B, C, T, H, W\), got \(2, 3, 40, 40\)"):
        tiny("video_swin")(images("swin", 40, 40))


def test_windows_of_one_frame_see_frames_one_by_one() -> None:
    arguments = {**SIZES, "out_indices": (0, 1), "drop_path_rate": 0.0}
    frames = randomise(hvt.SwinTransformer(**arguments, window_size=3)).double()
    clip = hvt.VideoSwinTransformer(**arguments, window_size=(1, 3, 3), patch_size=(1, 4, 4)).double()
    state = frames.state_dict()
    state["stages.0.downsample.proj.weight"] = state["stages.0.downsample.proj.weight"][:, :, None]
    clip.load_state_dict(state)
    x = clips(4, 60, 44)
    for found, *expected in zip(clip(x), *(frames(frame) for frame in x.unbind(2)), strict=True):
        torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=1e-9, atol=1e-9)


# torchvision's model


def torchvision_model(window: tuple[int, ...]) -> nn.Module:
    model = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=list(window), num_classes=5,
        stochastic_depth_prob=0.0, downsample_layer=PatchMerging,
    )  # fmt: skip
    return randomise(model).double().eval()


@pytest.mark.parametrize("size", [(8, 64, 64), (7, 50, 61), (3, 33, 90)])
def test_torchvision_computes_the_same(size: tuple[int, ...]) -> None:
    window = (2, 5, 5)
    theirs = torchvision_model(window)
    ours = hvt.Classifier(video_model(window_size=window), 5).double().eval()
    report = hvt.load_weights(ours, theirs.state_dict())
    assert (report.layout, report.family) == ("torchvision", "video_swin")
    assert not report.initialised
    x = clips(*size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)

    back = hvt.convert_state_dict(ours.state_dict(), to="torchvision", window_size=window)
    twin = torchvision_model(window)
    twin.load_state_dict(back, strict=True)
    torch.testing.assert_close(twin(x), theirs(x), rtol=0, atol=0)


# layouts


def test_a_backbone_with_a_norm_per_output_goes_to_mmaction2() -> None:
    state = tiny("video_swin").state_dict()
    written = hvt.convert_state_dict(state, to="mmaction2", window_size=(2, 4, 4))
    assert {"norm0.weight", "norm3.weight", "layers.0.blocks.0.attn.relative_position_index"} <= written.keys()
    assert hvt.load_weights(tiny("video_swin"), written).layout == "mmaction2"
    with pytest.raises(hvt.WeightsError, match=r"no place for stages\.0\.norm"):
        hvt.convert_state_dict(state, to="official")


def test_layouts_that_do_not_have_it() -> None:
    with pytest.raises(hvt.WeightsError, match="does not have the family video_swin: it has hvt, mmaction2, official"):
        hvt.convert_state_dict(tiny("video_swin").state_dict(), to="timm")
    with pytest.raises(hvt.WeightsError, match="does not have the family swin"):
        hvt.convert_state_dict(tiny("swin").state_dict(), to="mmaction2")


def test_images_and_video_are_told_apart_by_the_patch_embedding() -> None:
    video = hvt.convert_state_dict(tiny_classifier("video_swin").state_dict(), to="official")
    with pytest.raises(hvt.WeightsError, match="of the family video_swin"):
        hvt.load_weights(tiny_classifier("swin"), video)


# inflation

LAYOUTS = ["hvt", "official", "timm", "mmpretrain", "mmdet", "torchvision", "huggingface"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_inflated_alike(layout: str) -> None:
    classifier = image_model()
    # mmdet and Hugging Face's dense models norm each output; all others the last
    source = classifier.backbone if layout == "mmdet" else classifier
    written = hvt.convert_state_dict(source.state_dict(), to=layout)
    expected = hvt.inflate(classifier.state_dict(), window_size=(2, 4, 4))
    inflated = hvt.inflate(written, window_size=(2, 4, 4))
    assert inflated.keys() == expected.keys()
    assert all(torch.equal(inflated[key], expected[key]) for key in expected)

    model = hvt.Classifier(video_model(), 7)
    report = hvt.load_weights(model, written)
    assert report.initialised == ["head.weight", "head.bias"]
    assert len(report.inflated) == 5
    assert report.reasons["inflated"]["backbone.stages.0.downsample.proj.weight"] == "to 2 frames"
    assert "window 4x4 to 2x4x4" in report.reasons["inflated"].values()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.backbone.state_dict().items())


def test_a_clip_of_one_repeated_frame_gives_the_images_features() -> None:
    """Every window then holds each token several times, with the bias that it had: the softmax shares out alike."""
    classifier = image_model().double()
    model = video_model().double()
    hvt.load_weights(model, classifier.state_dict())
    frame = clips(96, 64)
    expected = classifier.forward_features(frame)
    found = model(frame[:, :, None].expand(-1, -1, 8, -1, -1))[-1]
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-9, atol=1e-9)


def test_a_file_is_inflated(tmp_path: Path) -> None:
    torch.save({"model": hvt.convert_state_dict(image_model().state_dict(), to="official")}, tmp_path / "images.pth")
    inflated = hvt.inflate(tmp_path / "images.pth", window_size=((3, 4, 4), (2, 6, 5)))
    assert inflated["stages.0.blocks.0.attn.position_bias.table"].shape == (5 * 7 * 7, 1)
    assert inflated["stages.1.blocks.0.attn.position_bias.table"].shape == (3 * 11 * 9, 2)
    model = video_model(window_size=((3, 4, 4), (2, 6, 5)))
    assert hvt.load_weights(model, inflated).ok


def test_tubes_of_other_lengths_and_other_channels() -> None:
    weight = image_model().state_dict()["backbone.stages.0.downsample.proj.weight"]
    grey = video_model(patch_size=(4, 4, 4), in_chans=1)
    hvt.load_weights(grey, image_model().state_dict())
    found = grey.stages[0].downsample.proj.weight
    torch.testing.assert_close(found, weight.sum(1, keepdim=True)[:, :, None].expand_as(found) / 4)


def test_what_cannot_be_inflated() -> None:
    with pytest.raises(hvt.WeightsError, match="only 2-D Swin is inflated to video, the weights are of swinv2"):
        hvt.inflate(tiny_classifier("swinv2").state_dict())
    with pytest.raises(hvt.WeightsError, match="only 2-D Swin is inflated to video, the weights are of video_swin"):
        hvt.inflate(tiny_classifier("video_swin").state_dict())
    with pytest.raises(hvt.WeightsError, match="absolute position embedding, which Video Swin has not"):
        hvt.inflate(image_model(ape_size=8).state_dict())
    with pytest.raises(hvt.InputError, match="patch_frames is 0"):
        hvt.inflate(image_model().state_dict(), patch_frames=0)
    oblong = image_model(window_size=(4, 3))
    with pytest.raises(hvt.WeightsError, match="35 rows, of no square window"):
        hvt.inflate(oblong.state_dict())
    with pytest.raises(hvt.WeightsError, match=r"depths \(2, 2\) and 8 channels, the model has depths \(2, 1\)"):
        hvt.load_weights(video_model(depths=(2, 1)), image_model().state_dict())


def test_names_of_image_models_are_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(source: str | Path, **_: object) -> Path:
        if isinstance(source, Path):
            return source
        asked.append(source)
        torch.save(image_model().state_dict(), tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    monkeypatch.setattr(sources, "fetch", fetch)
    arguments = {**SIZES, "window_size": (2, 4, 4), "out_indices": (1,)}
    model = hvt.create_backbone("video_swin_tiny", pretrained="swin_tiny.in22k", **arguments)
    assert asked == ["hf-hub:timm/swin_tiny_patch4_window7_224.ms_in22k"]
    expected = hvt.inflate(image_model().state_dict(), window_size=(2, 4, 4))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(
        hvt.InputError, match="inflated from a 2-D Swin, such as swin_tiny, not from swinv2_tiny_window8"
    ):
        hvt.create_backbone("video_swin_tiny", pretrained="swinv2_tiny_window8", **arguments)
    with pytest.raises(hvt.InputError, match="inflated from a 2-D Swin, such as swin_tiny, not from pvt_v2_b0"):
        hvt.create_backbone("video_swin_tiny", pretrained="pvt_v2_b0", **arguments)
    with pytest.raises(hvt.WeightsError, match="no weights 'k400'; it has in1k_ft_k400.*inflated from a 2-D Swin"):
        hvt.create_backbone("video_swin_tiny", pretrained="k400", **arguments)


def test_a_classifier_has_the_classes_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**SIZES, "window_size": (2, 4, 4)}

    def fetch(source: str | Path, **_: object) -> Path:
        if not isinstance(source, Path):
            path = tmp_path / "weights.pth"
            classes = next((n for word, n in (("600", 600), ("sthv2", 174)) if word in source), 400)
            torch.save(hvt.create_classifier("video_swin_tiny", num_classes=classes, **arguments).state_dict(), path)
            return path
        return source

    monkeypatch.setattr(sources, "fetch", fetch)
    for pretrained, name, classes in [
        (True, "video_swin_tiny", 400),
        (True, "swin_base_patch244_window877_kinetics600_22k", 600),
        ("official_in22k_ft_k600", "video_swin_base", 600),
        (True, "video_swin_base_window16", 174),
        (False, "video_swin_tiny", 400),
    ]:
        model = hvt.create_classifier(name, pretrained=pretrained, **arguments)
        assert model.num_classes == classes
    assert hvt.create_classifier("video_swin_tiny", num_classes=3, **arguments).num_classes == 3


def test_hvt_convert_inflates_for_a_video_model(tmp_path: Path) -> None:
    images = hvt.create_classifier("swin_tiny", num_classes=3)
    torch.save(hvt.convert_state_dict(images.state_dict(), to="official"), tmp_path / "images.pth")
    output = tmp_path / "video.pth"
    command = ["convert", str(tmp_path / "images.pth"), str(output), "--to", "mmaction2", "--model", "video_swin_tiny"]
    assert main(command) in (0, None)
    written = read_weights(output).tensors
    assert written["patch_embed.proj.weight"].shape == (96, 3, 2, 4, 4)
    assert written["layers.0.blocks.0.attn.relative_position_index"].shape == (392, 392)
    expected = hvt.inflate(images.state_dict())
    report = hvt.load_weights(model := hvt.create_backbone("video_swin_tiny", out_indices=(3,)), written)
    assert report.layout == "mmaction2"
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


# other windows


def test_position_tables_take_longer_windows() -> None:
    """Something-Something's model of 16 frames per window starts from one of 8."""
    short, long = randomise(video_model(window_size=(3, 4, 4))), video_model(window_size=(5, 4, 4))
    with torch.no_grad():
        for stage in short.stages:
            for block in stage.blocks:  # a bias that grows evenly with the offset in time
                table = block.attn.position_bias.table.view(5, 49, -1)
                table[:] = table[:1] + torch.arange(5.0)[:, None, None]
    report = hvt.load_weights(long, short.state_dict())
    assert set(report.reasons["resized"].values()) == {"window 3x4x4 to 5x4x4"}
    table = long.stages[0].blocks[0].attn.position_bias.table.view(9, 49, -1)
    steps = table[1:] - table[:-1]
    assert (steps[1:-1] > 0.5).all()
    torch.testing.assert_close(table[4], short.stages[0].blocks[0].attn.position_bias.table.view(5, 49, -1)[2])
    with pytest.raises(hvt.WeightsError, match="do not fit"):
        hvt.load_weights(video_model(window_size=(3, 5, 5)), short.state_dict())
