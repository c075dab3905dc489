"""The figures of each block against the same computed by hand, and `hvt diagnose` as a user runs it."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hvt_backbones import create_backbone, create_classifier, diagnose
from hvt_backbones.cli import main
from hvt_backbones.diagnose import Observer, folder_classes
from hvt_backbones.layers.attention import SpatialReductionAttention
from hvt_backbones.model_file import metadata_of
from hvt_backbones.weights.files import save_state_dict
from hvt_backbones.weights.published import Preprocessing

from .families import TINY, images, tiny, tiny_classifier

SIZE = 53, 70  # maps that windows and reductions do not divide


def logits_by_hand(attention: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What each softmax takes, (heads, N, M), for one map (*spatial, C), by the papers' formulas and slices."""
    heads = attention.num_heads
    if isinstance(attention, SpatialReductionAttention):
        keys = attention.reduce(x[None]) @ attention.kv.weight.T + attention.kv.bias
        q = (x @ attention.q.weight.T + attention.q.bias).reshape(-1, heads, x.shape[-1] // heads)
        k = keys[..., : x.shape[-1]].reshape(-1, heads, x.shape[-1] // heads)
        yield torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        return
    spatial, dim, local = x.shape[:-1], x.shape[-1], not hasattr(attention, "position_bias")
    window, shift = (attention.window_size, (0, 0)) if local else attention.fit_window(spatial)
    missing = [-side % length for side, length in zip(spatial, window, strict=True)]
    x = F.pad(x, [0, 0, *(n for end in reversed(missing) for n in (0, end))])
    bias = attention.qkv.bias
    if hasattr(attention, "q_bias"):
        bias = torch.cat([attention.q_bias, 0 * attention.q_bias, attention.v_bias])
    qkv = torch.roll(x @ attention.qkv.weight.T + bias, [-s for s in shift], tuple(range(len(shift))))
    region = torch.zeros(x.shape[:-1])
    for axis, (side, offset) in enumerate(zip(window, shift, strict=True)):
        cuts = [slice(0, -side), slice(-side, -offset), slice(-offset, None)] if offset else [slice(None)]
        for number, cut in enumerate(cuts):
            region[(slice(None),) * axis + (cut,)] += number * 10**axis
    for place in numpy.ndindex(*(length // side for length, side in zip(x.shape, window, strict=False))):
        tokens = tuple(slice(at * side, (at + 1) * side) for at, side in zip(place, window, strict=True))
        q, k, _ = qkv[tokens].reshape(-1, 3, heads, dim // heads).unbind(1)
        if hasattr(attention, "logit_scale"):
            cosine = torch.einsum("nhd,mhd->hnm", F.normalize(q, dim=-1), F.normalize(k, dim=-1))
            logits = cosine * attention.logit_scale.clamp(max=math.log(100)).exp()
        else:
            logits = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(dim // heads)
        if not local:
            logits = logits + attention.position_bias(window, x.device, x.dtype)
        label = region[tokens].flatten()
        yield logits - 100 * (label[:, None] != label[None])


@pytest.mark.parametrize("family", TINY)
def test_figures_are_those_by_hand(family: str) -> None:
    """Over two batches of unequal size."""
    model = tiny(family).double()
    pictures = images(family, *SIZE, batch=3).double()
    logits, outputs = defaultdict(list), {}

    def keep(name: str, attention: nn.Module, x: Tensor) -> None:
        logits[name] += [one for each in x for one in logits_by_hand(attention, each)]

    names = {block: f"stages.{i}.blocks.{j}" for i, s in enumerate(model.stages) for j, block in enumerate(s.blocks)}
    handles = []
    for block, name in names.items():
        handles.append(block.attn.register_forward_hook(lambda attn, args, _, name=name: keep(name, attn, args[0])))
        handles.append(block.register_forward_hook(lambda _, __, y, name=name: outputs.update({name: y})))
    with torch.no_grad():
        model(pictures)
    for handle in handles:
        handle.remove()
    observer = Observer(model)
    with torch.no_grad(), observer.watching():
        model(pictures[:1])
        model(pictures[1:])

    found = observer.diagnoses()
    assert [block.block for block in found] == list(names.values())
    for block in found:
        output = outputs[block.block]
        assert block.variance == pytest.approx(
            output.reshape(-1, output.shape[-1]).numpy().var(axis=0).mean(), rel=1e-9
        )
        assert block.logit == pytest.approx(max(one.max().item() for one in logits[block.block]), rel=1e-9)
        weights = [one.softmax(-1) for one in logits[block.block]]
        keys = weights[0].shape[-1]
        rows = torch.cat([-torch.xlogy(one, one).sum(-1).flatten() for one in weights])
        assert keys > 1
        assert block.entropy == pytest.approx(rows.mean().item() / math.log(keys), rel=1e-9)


def test_logits_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = tiny("swin").double(), images("swin", *SIZE).double()
    whole, parts = Observer(model), Observer(model)
    with torch.no_grad(), whole.watching():
        model(pictures)
    monkeypatch.setattr(diagnose, "MOST_LOGITS", 1000)
    with torch.no_grad(), parts.watching():
        model(pictures)
    for one, other in zip(whole.diagnoses(), parts.diagnoses(), strict=True):
        assert one.logit == other.logit
        assert one.entropy == pytest.approx(other.entropy, rel=1e-12)


def test_logits_are_not_rounded_under_autocast() -> None:
    model = tiny(
        "pvt_v2", depths=(1,), num_heads=(1,), embed_dims=(8,), mlp_ratios=(2,), sr_ratios=(2,), out_indices=(0,)
    )
    attention, kept = model.stages[0].blocks[0].attn, {}
    for name in ("q", "kv"):
        getattr(attention, name).register_forward_hook(lambda _, __, y, name=name: kept.update({name: y.float()}))
    observer = Observer(model)
    with torch.no_grad(), observer.watching(), torch.autocast("cpu", torch.bfloat16):
        model(images("pvt_v2", *SIZE))
    (block,) = observer.diagnoses()
    logits = kept["q"].flatten(1, 2) @ kept["kv"][..., :8].flatten(1, 2).mT / math.sqrt(8)
    assert block.logit == pytest.approx(logits.max().item(), rel=1e-6)


def test_attention_to_one_key_has_no_entropy() -> None:
    model = tiny("pvt_v2")
    (first, *_), (*_, last) = (diagnose.diagnose(model, [(images("pvt_v2", side, side), None)]) for side in (64, 32))
    assert first.entropy is not None
    assert (last.entropy, last.grad_norm) == (None, None)
    assert last.logit is not None


@pytest.mark.parametrize("given", [True, False], ids=["labels", "predictions"])
def test_gradient_norms_are_those_of_the_mean_loss(given: bool) -> None:
    model = tiny_classifier("swin").double()
    model.freeze_stages(1)
    pictures = images("swin", 40, 40, batch=5).double()
    logits = model.eval()(pictures)
    classes = torch.tensor([3, 1, 4, 1, 0]) if given else logits.argmax(-1)
    F.cross_entropy(logits, classes).backward()
    expected = {}
    for i, stage in enumerate(model.backbone.stages):
        for j, block in enumerate(stage.blocks):
            gradients = [parameter.grad.flatten() for parameter in block.parameters() if parameter.requires_grad]
            expected[f"stages.{i}.blocks.{j}"] = torch.cat(gradients).norm().item() if gradients else None
    batches = zip(pictures.split(2), classes.split(2) if given else [None] * 3, strict=True)
    found = {block.block: block.grad_norm for block in diagnose.diagnose(model, batches)}
    assert found["stages.0.blocks.1"] is None
    assert found == {name: norm and pytest.approx(norm, rel=1e-9) for name, norm in expected.items()}


def test_a_diagnosis_leaves_the_model_as_it_was() -> None:
    model, pictures = tiny_classifier("swinv2", drop_path_rate=0.5), images("swinv2", 40, 40)
    model.train()
    model.backbone.stages[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(1)
    expected = model(pictures)
    torch.manual_seed(1)
    diagnose.diagnose(model, [(pictures, None)])
    assert torch.equal(model(pictures), expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, weights[name])


@pytest.mark.slow
def test_compiled_blocks_are_looked_into_and_not_compiled_anew() -> None:
    model = tiny("swin", depths=(1,), num_heads=(1,), out_indices=(0,))
    pictures, compiled = images("swin", 32, 32), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    model.stages[0].blocks[0].compile(backend=backend)
    with torch.no_grad():
        expected = model(pictures)
        count = len(compiled)
        (row,) = diagnose.diagnose(model, [(pictures, None)])
        assert row.logit is not None
        assert all(torch.equal(*pair) for pair in zip(model(pictures), expected, strict=True))
    assert len(compiled) == count > 0


def test_folders_are_classes_by_name_or_by_number() -> None:
    folder = Path("data")
    pictures = [folder / "10" / "a.png", folder / "9" / "deeper" / "b.png"]
    assert folder_classes(pictures, folder, ["9", "8", "10"], 3) == {pictures[0]: 2, pictures[1]: 0}
    assert folder_classes(pictures, folder, ["9", "8"], 2) is None
    assert folder_classes(pictures, folder, None, 2) == {pictures[0]: 1, pictures[1]: 0}
    assert folder_classes(pictures, folder, None, 3) is None
    assert folder_classes([*pictures, folder / "c.png"], folder, ["9", "8", "10", "c.png"], 4) is None


# ---- hvt diagnose

ARGUMENTS = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a head and without, and a folder of nine pictures of two of three classes."""
    root = tmp_path_factory.mktemp("diagnose")
    torch.manual_seed(0)
    generator = numpy.random.default_rng(0)
    for name in ("cat", "owl"):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(6 if name == "cat" else 3):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(root / "pictures" / name / f"{i}.png")
    about = metadata_of(
        "swin_tiny", ARGUMENTS, Preprocessing(input_size=(3, 32, 32)), class_names=["cat", "dog", "owl"]
    )
    model = create_classifier("swin_tiny", num_classes=3, **ARGUMENTS)
    save_state_dict(model.state_dict(), root / "tiny.safetensors", about)
    backbone = create_backbone("swin_tiny", **ARGUMENTS)
    headless = metadata_of("swin_tiny", ARGUMENTS, Preprocessing(input_size=(3, 32, 32)), class_names=[])
    headless = {key: text for key, text in headless.items() if "class" not in key}
    save_state_dict(backbone.state_dict(), root / "headless.safetensors", headless)
    return root


def diagnosis(capsys: pytest.CaptureFixture, model: Path, data: Path, output: Path, *options: str) -> tuple[str, dict]:
    arguments = ["diagnose", model, "--data", data, "--output", output, "--device", "cpu", *options]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out, json.loads(output.with_suffix(".json").read_text())


def test_the_command_prints_a_table_and_writes_a_picture_and_json(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "new" / "found.png"
    said, found = diagnosis(capsys, data / "tiny.safetensors", data / "pictures", output, "--batch", "4")
    facts = {key: found[key] for key in ("model", "weights", "pictures", "classes")}
    assert facts == {
        "model": "swin_tiny", "weights": str(data / "tiny.safetensors"), "pictures": 9, "classes": "folders",
    }  # fmt: skip
    lines = said.splitlines()
    for row, line in zip(found["blocks"], lines[1:4], strict=True):
        assert line.split() == [row["block"], *(f"{row[n]:.4g}" for n in ("variance", "entropy", "logit", "grad_norm"))]
    assert lines[4] == "9 pictures; gradients of the cross-entropy to the classes of the folders"
    assert lines[5] == f"wrote {output} and {output.with_suffix('.json')}"
    with Image.open(output) as picture:
        assert picture.width > 1000
    assert sorted(path.name for path in output.parent.iterdir()) == ["found.json", "found.png"]

    # of one folder alone nothing tells its class
    said, of_cats = diagnosis(capsys, data / "tiny.safetensors", data / "pictures" / "cat", output, "--pictures", "4")
    assert (of_cats["pictures"], of_cats["classes"]) == (3, "predictions")
    assert "to the model's own most probable classes" in said
    said, headless = diagnosis(capsys, data / "headless.safetensors", data / "pictures", output)
    assert headless["classes"] is None
    assert [row["grad_norm"] for row in headless["blocks"]] == [None] * 3
    assert headless["blocks"][0]["variance"] > 0
    assert "no gradients, for the model has no head" in said


def test_what_is_no_number_is_null(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = create_classifier("swin_tiny", num_classes=3, **ARGUMENTS)
    with torch.no_grad():
        model.backbone.stages[0].blocks[0].mlp.fc2.bias.fill_(math.inf)
    about = metadata_of(
        "swin_tiny", ARGUMENTS, Preprocessing(input_size=(3, 32, 32)), class_names=["cat", "dog", "owl"]
    )
    save_state_dict(model.state_dict(), tmp_path / "broken.safetensors", about)
    said, found = diagnosis(capsys, tmp_path / "broken.safetensors", data / "pictures", tmp_path / "broken.png")
    assert found["blocks"][0]["variance"] is None
    assert found["blocks"][0]["logit"] is not None
    assert "nan" in said.splitlines()[1]


BAD = {
    "no folder": ("MODEL --data missing", "missing is no folder"),
    "a picture": ("MODEL --data PICTURES/cat/0.png", "0.png is no folder"),
    "no pictures": ("MODEL --data EMPTY", "holds no pictures"),
    "unknown model": ("swin_tinny --data PICTURES", "did you mean swin_tiny"),
    "missing checkpoint": ("missing.pth --data PICTURES", "missing.pth does not exist"),
    "clips": ("video_swin_tiny --data PICTURES", "takes clips, not pictures"),
    "another suffix": ("MODEL --data PICTURES --output found.jpg", "end the name in .png"),
    "no batch": ("MODEL --data PICTURES --batch 0", "--batch"),
    "unknown device": ("MODEL --data PICTURES --device tpu", "auto, cpu, cuda, npu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command, words = BAD[case]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": data / "tiny.safetensors", "EMPTY": tmp_path / "empty", "PICTURES": data / "pictures"}
    for word, place in places.items():
        command = command.replace(word, str(place))
    assert main(["diagnose", *command.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_without_matplotlib_one_line_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = tmp_path / "found.png"
    model, pictures = str(data / "tiny.safetensors"), str(data / "pictures")
    assert main(["diagnose", model, "--data", pictures, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install matplotlib" in error
    assert not output.exists()


def test_a_picture_that_cannot_be_read_is_left_out(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    output, model = tmp_path / "found.png", str(data / "tiny.safetensors")
    assert main(["diagnose", model, "--data", str(tmp_path), "--output", str(output)]) == 1
    assert "broken.png cannot be read" in capsys.readouterr().err
    assert not output.exists()
    Image.new("RGB", (32, 32)).save(tmp_path / "a" / "sound.png")
    assert main(["diagnose", model, "--data", str(tmp_path), "--output", str(output), "--on-error", "fail"]) == 2
    assert not output.exists()
    assert main(["diagnose", model, "--data", str(tmp_path), "--output", str(output)]) == 1
    assert json.loads(output.with_suffix(".json").read_text())["pictures"] == 1
