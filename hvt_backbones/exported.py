"""Models that have left PyTorch's eager mode: ONNX, OpenVINO, torch.export and AOTInductor files of `hvt export`.

`load_exported` opens one for calls; `open_runnable` is `open_model` for commands that only need to run a model.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .model_file import EXPORTED, ModelFile, open_model
from .variants import VARIANTS
from .weights.published import Preprocessing
from .weights.recorded import PREFIX

FACTS = "facts"  # name of the entry in a file's metadata, JSON of `Facts`
Run = Callable[[Tensor], Sequence[Tensor]]


def needs(package: str, what: str) -> Any:
    """Import a package of the extra `export`.

    Raises:
        InputError: it is not installed; the message has the command that adds it.
    """
    if find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}: pip install 'hvt_backbones[export]'")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reports its use to its makers, from 1.32 on
    return import_module(package)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an exported file says of itself, beside its graph.

    Attributes:
        model: name of the model's row in `variants.py`.
        outputs: names of what it returns: "logits", or "stage0" and so on.
        strides: pixels of the image to a place of each map; empty for classifiers.
        num_classes, class_names: of a classifier; names where they are known.
        size: the only (height, width) or (frames, height, width) that it takes; None for any.
        dtype: in which it computes: "float32", "float16", "int8".
        preprocessing: of the pictures or frames.
    """

    model: str
    outputs: Sequence[str]
    strides: Sequence[int] = ()
    num_classes: int = 0
    class_names: Sequence[str] | None = None
    size: Sequence[int] | None = None
    dtype: str = "float32"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def to_metadata(self) -> dict[str, str]:
        """Text by name: a key "hvt.x" for each fact, so that other runtimes read them without this library."""
        facts = {key: value for key, value in asdict(self).items() if key != "preprocessing"}
        facts |= asdict(self.preprocessing)
        return {PREFIX + key: json.dumps(value) for key, value in facts.items()}

    @classmethod
    def from_metadata(cls, source: str, metadata: Mapping[str, str]) -> Facts:
        """
        Raises:
            InputError: the text is not what `to_metadata` writes.
        """
        try:
            facts = {
                key: json.loads(metadata[PREFIX + key]) for key in cls.__dataclass_fields__ if key != "preprocessing"
            }
            prepared = {key: json.loads(metadata[PREFIX + key]) for key in Preprocessing.__dataclass_fields__}
            prepared |= {key: tuple(value) for key, value in prepared.items() if isinstance(value, list)}
            return cls(**facts, preprocessing=Preprocessing(**prepared))
        except (KeyError, json.JSONDecodeError, TypeError):
            raise InputError(f"{source} was not written by `hvt export`, so nothing tells how to feed it") from None


class ExportedModel(nn.Module):
    """An exported file as a module: images (B, C, [T,] H, W) float32 -> logits, or a tuple of maps, on their device.

    Attributes:
        facts: what the file says of itself.
        out_indices, strides: of the maps that it returns, as a `Backbone` has them.

    Raises:
        InputError: at a call with images of a size that the file does not take.
    """

    def __init__(self, source: str, facts: Facts, start: Callable[[torch.device], Run]) -> None:
        super().__init__()
        self.source, self.facts = source, facts
        self.num_classes = facts.num_classes
        self.chosen = list(range(len(facts.outputs)))
        self._start, self._device = start, torch.device("cpu")
        self._run: Run | None = None

    @property
    def out_indices(self) -> tuple[int, ...]:
        return tuple(int(self.facts.outputs[i].removeprefix("stage")) for i in self.chosen)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.facts.strides[i] for i in self.chosen)

    def choose(self, out_indices: Sequence[int]) -> None:
        """Return the maps of these stages only.

        Raises:
            InputError: the file has no such map.
        """
        names = [f"stage{index}" for index in out_indices]
        for name in names:
            if name not in self.facts.outputs:
                raise InputError(f"{self.source} has {', '.join(self.facts.outputs)}, not {name}: choose among these")
        self.chosen = sorted(self.facts.outputs.index(name) for name in set(names))

    def to(self, device: torch.device) -> ExportedModel:  # type: ignore[override] # the graph's types are fixed
        """Run on this device from now on."""
        self._device, self._run = device, None
        return self

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        size = self.facts.size
        if size is not None and tuple(images.shape[2:]) != tuple(size):
            given, made = ("x".join(map(str, sides)) for sides in (images.shape[2:], size))
            raise InputError(f"{self.source} was made for {made} alone, not for {given}: export it without --static")
        if self._run is None:
            self._run = self._start(self._device)
        found = self._run(images.float())
        if self.num_classes:
            return found[0].to(images.device)
        return tuple(found[i].to(images.device) for i in self.chosen)

    def extra_repr(self) -> str:
        return f"{self.source}, {', '.join(self.facts.outputs)}, {self.facts.dtype}"


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """An exported file where commands expect a `ModelFile`; see there for the attributes."""

    source: str
    model: ExportedModel

    @property
    def name(self) -> str:
        return self.model.facts.model

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.model.facts.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        return self.model.facts.preprocessing

    def check_head(self) -> None:
        """
        Raises:
            InputError: it returns maps.
        """
        if not self.num_classes:
            raise InputError(f"{self.source} returns feature maps, so it predicts nothing: `hvt features` reads it")

    def classifier(self) -> ExportedModel:
        self.check_head()
        return self.model.eval()

    def backbone(self, *, out_indices: Sequence[int] | None = None) -> ExportedModel:
        """
        Raises:
            InputError: it returns classes, or not these maps.
        """
        if self.num_classes:
            raise InputError(f"{self.source} returns classes, not maps: export it once more with --maps")
        if out_indices is not None:
            self.model.choose(out_indices)
        return self.model.eval()


def open_runnable(source: str, model: str | None = None, weights_key: str | None = None) -> ModelFile | ExportedFile:
    """`open_model`, also for exported files.

    Raises:
        InputError: as `open_model` and `load_exported`, or a file of a detector and the like.
    """
    if Path(source).suffix not in EXPORTED:
        return open_model(source, model, weights_key)
    if model is not None or weights_key is not None:
        raise InputError(
            f"--model and --weights-key are for weights, and {source} is an exported model: leave them out"
        )
    model_of_file = load_exported(source)
    if model_of_file.facts.model not in VARIANTS:
        raise InputError(
            f"{source} is of {model_of_file.facts.model}, none of `hvt models`: call it by "
            "hvt_backbones.exported.load_exported"
        )
    return ExportedFile(source=source, model=model_of_file)


def load_exported(path: str | Path) -> ExportedModel:
    """The model in a file of `hvt export`, to be called as one of PyTorch.

    ONNX files are run by ONNX Runtime (on CUDA where that has it), OpenVINO's by OpenVINO on the CPU in float32,
    programs of torch.export on any device, packages of AOTInductor on the kind of device that they were compiled for.
    The last two hold code: load those of people you trust.

    Raises:
        InputError: no such file, none of `hvt export`, or its runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: check the path")
    if path.suffix not in EXPORTED:
        raise InputError(f"{path} is no exported model: expected a name in {', '.join(EXPORTED)}")
    opened = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_program}[path.suffix](path)
    metadata, start = opened
    return ExportedModel(str(path), Facts.from_metadata(str(path), metadata), start)


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as {EXPORTED[path.suffix]} ({error}): export it once more")


def _open_onnx(path: Path) -> tuple[Mapping[str, str], Callable[[torch.device], Run]]:
    runtime = needs("onnxruntime", str(path))
    try:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class of their own
        raise _damaged(path, error) from None

    def start(device: torch.device) -> Run:
        on_device = session
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in runtime.get_available_providers():
                raise InputError(f"{path}: this ONNX Runtime has no CUDA: install onnxruntime-gpu, or use --device cpu")
            on_device = runtime.InferenceSession(path, providers=["CUDAExecutionProvider"])
        elif device.type != "cpu":
            raise InputError(f"{path} runs on cpu and cuda, not on {device.type}: choose another device")
        name = on_device.get_inputs()[0].name
        return lambda images: [torch.from_numpy(y) for y in on_device.run(None, {name: images.cpu().numpy()})]

    return session.get_modelmeta().custom_metadata_map, start


@functools.cache
def openvino_core() -> Any:
    """OpenVINO, started once and kept.

    On CPUs with AMX each that is started gives its thread another stack for signals, and puts back the one before when
    it ends. Where two end in the order in which they began, that one is gone, and the next signal ends the process.
    """
    return import_module("openvino").Core()


def _open_openvino(path: Path) -> tuple[Mapping[str, str], Callable[[torch.device], Run]]:
    needs("openvino", str(path))
    try:
        graph = openvino_core().read_model(path)
        told = graph.get_rt_info("hvt").value if graph.has_rt_info("hvt") else {}
    except Exception as error:
        raise _damaged(path, error) from None
    metadata = {PREFIX + key: str(getattr(value, "value", value)) for key, value in told.items()}

    def start(device: torch.device) -> Run:
        if device.type != "cpu":
            raise InputError(f"{path} runs on the cpu here, not on {device.type}: choose --device cpu")
        compiled = openvino_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def run(images: Tensor) -> list[Tensor]:
            found = compiled(images.numpy())
            return [torch.from_numpy(found[i]) for i in range(len(compiled.outputs))]

        return run

    return metadata, start


def _open_program(path: Path) -> tuple[Mapping[str, str], Callable[[torch.device], Run]]:
    try:
        with zipfile.ZipFile(path) as archive:
            compiled = any("/aotinductor/" in name for name in archive.namelist())
        return _open_package(path) if compiled else _open_graph(path)
    except InputError:
        raise
    except Exception as error:
        raise _damaged(path, error) from None


def _open_package(path: Path) -> tuple[Mapping[str, str], Callable[[torch.device], Run]]:
    package = torch._inductor.aoti_load_package(str(path))
    metadata = package.get_metadata()
    made_for = metadata.get("AOTI_DEVICE_KEY", "cpu")

    def start(device: torch.device) -> Run:
        if device.type != made_for:
            raise InputError(f"{path} was compiled for {made_for}, not for {device.type}: choose --device {made_for}")
        return lambda images: _as_list(package(images.to(device)))

    return metadata, start


def _open_graph(path: Path) -> tuple[Mapping[str, str], Callable[[torch.device], Run]]:
    extra = {FACTS: ""}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing writes to it
        program = torch.export.load(path, extra_files=extra)

    def start(device: torch.device) -> Run:
        from torch.export.passes import move_to_device_pass

        module = program.module() if device.type == "cpu" else move_to_device_pass(program, device).module()
        return lambda images: _as_list(module(images.to(device)))

    return json.loads(extra[FACTS] or "{}"), start


def _as_list(found: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found
