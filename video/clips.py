"""Clips of a list file for mmaction2, with an answer to damaged files and to a machine without decord.

A configuration names it in `custom_imports = dict(imports=["hvt_backbones.openmmlab", "video.clips"])`. Everything that
a process which loads clips needs is imported here, whichever way the process was started.
"""

# ruff: noqa: E402 - mmaction imports after import_framework()

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from runner.patches import import_framework

import_framework("mmaction")

from mmaction.datasets import VideoDataset
from mmaction.datasets.transforms import DecordDecode, DecordInit
from mmaction.evaluation import AccMetric
from mmaction.registry import DATASETS, HOOKS, METRICS, TRANSFORMS
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from mmengine.logging import MMLogger, print_log
from mmengine.runner import Runner
from numpy.typing import NDArray

from hvt_backbones.errors import InputError
from hvt_backbones.images import bearable
from hvt_backbones.weights.report import some
from runner.parts import PARTS, data_of, evaluators_of, type_name

from .decoders import explain, find_decoder, read_bytes
from .lists import clip_path, find_missing, read_list
from .readers import Clip, ClipError

UNREADABLE = "unreadable"  # of a sample: the clips that were passed over for it
LEFT_OUT = {"pred": None, "label": None}
said: dict[str, set[str]] = {}  # the name of a run's logger -> lines that need no second time


@TRANSFORMS.register_module()
class ClipInit(DecordInit):
    """mmaction2's `DecordInit` for either decoder: the number of frames are those that are shown.

    Args:
        decoder: see `video.readers.Clip`.
        **arguments: those of `DecordInit`.
    """

    def __init__(self, decoder: str = "auto", **arguments: Any) -> None:
        super().__init__(**arguments)
        self.decoder = decoder

    def _get_video_reader(self, filename: str) -> Clip:
        backend = "local" if self.io_backend == "disk" else self.io_backend  # MMEngine's FileClient warns of itself
        store = get_file_backend(backend_args={"backend": backend, **self.kwargs}, enable_singleton=True)
        return Clip(store.get(clip_path("", filename)), self.decoder, self.num_threads)


@TRANSFORMS.register_module()
class ClipDecode(DecordDecode):
    """mmaction2's `DecordDecode` for either decoder; its mode "efficient" takes key frames."""

    def _decord_load_frames(self, container: Clip, frame_inds: NDArray) -> list[NDArray]:
        return list(container.read(frame_inds.reshape(-1).tolist(), keys=self.mode == "efficient"))


OPENING, READING = ClipInit, (ClipInit, ClipDecode)


def decoding_steps(pipeline: Sequence[Any], decoder: str = "auto") -> list[Any]:
    """A pipeline that is written for decord, for the decoder of this name, or the one that is there; says which, once.

    Raises:
        InputError: see `find_decoder`.
    """
    chosen = find_decoder(decoder)
    run = MMLogger.get_current_instance().instance_name
    if (line := f"clips are decoded by {chosen.name}: {chosen.reason}") not in said.get(run, ()):
        said.setdefault(run, set()).add(line)
        if is_main_process():
            print_log(line, logger="current")
    return [_decoding_step(step, chosen.setting) for step in pipeline]


def _decoding_step(step: Any, decoder: str) -> Any:
    if not isinstance(step, Mapping):
        return step
    name = type_name(step)
    arguments = {key: value for key, value in step.items() if key not in ("type", "multi_thread")}
    if name in ("DecordInit", "PyAVInit"):
        return {"type": ClipInit, "decoder": "pyav" if name == "PyAVInit" else decoder, **arguments}
    return {"type": ClipDecode, **arguments} if name in ("DecordDecode", "PyAVDecode") else step


@DATASETS.register_module()
class ClipDataset(VideoDataset):
    """mmaction2's `VideoDataset`, whose samples are a line `path label` of a list, with these differences.

    A list is checked as it is read: labels, duplicates and missing files are refused with the number of the line. Paths
    may have blanks. A pipeline for decord runs on PyAV where decord does not import or cannot decode.

    A clip that is too short for `SampleFrames` is no error: as published, its frames are taken again from the first.

    Args:
        ann_file: the list.
        pipeline: mmaction2's steps.
        on_error: at a clip that cannot be read (missing, empty, without video, damaged, too short): "fail" ends the run
            with its name. With "skip" the next one that can be read takes its place in training; in evaluation it is
            left out of `ClipAccMetric`, which reports the number.
        max_errors: largest share of the clips that "skip" bears; above 0, one clip at least.
        min_frames: clips with fewer are too short.
        decoder: "decord", "pyav", or "auto": decord, and PyAV for what it cannot decode or where it is missing.
        num_classes: labels are below it; by default the number of classes in `metainfo`.
        **arguments: those of `VideoDataset`.

    Raises:
        InputError: a list, a value or, with "fail", a clip as above.
    """

    def __init__(
        self,
        ann_file: str,
        pipeline: Sequence[Any],
        *,
        on_error: Literal["fail", "skip"] = "fail",
        max_errors: float = 0.01,
        min_frames: int = 1,
        decoder: str = "auto",
        **arguments: Any,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise InputError(f"on_error is {on_error!r}: choose fail or skip")
        if isinstance(max_errors, bool) or not isinstance(max_errors, int | float) or not 0 <= max_errors <= 1:
            raise InputError(f"max_errors is {max_errors!r}: give a share from 0 to 1")
        if isinstance(min_frames, bool) or not isinstance(min_frames, int) or min_frames < 1:
            raise InputError(f"min_frames is {min_frames!r}: give a whole number from 1")
        self.on_error = on_error
        self.max_errors = max_errors
        self.min_frames = min_frames
        self.decoder = find_decoder(decoder).setting
        super().__init__(ann_file, decoding_steps(pipeline, decoder), **arguments)

    @property
    def max_unreadable(self) -> int:
        """Clips that may be passed over."""
        return bearable(self.max_errors, len(self))

    def load_data_list(self) -> list[dict[str, Any]]:
        if self.multi_class:
            return super().load_data_list()
        count = self.num_classes or len(self.metainfo.get("classes") or ()) or None
        entries, problems = read_list(self.ann_file, count, self.delimiter)
        if problems:
            raise InputError(_first(problems))
        root = self.data_prefix.get("video") or ""
        if self.on_error == "fail" and self._is_on_disk() and (missing := find_missing(entries, root)):
            lines = [f"{self.ann_file} line {one.line}: {clip_path(root, one.path)} does not exist" for one in missing]
            raise InputError(
                f"{_first(lines)}; `python -m video.check {self.ann_file} --root {root or '.'} --write-clean FILE` "
                "writes a list without what cannot be read, on_error=skip of the data set goes on without it"
            )
        return [{"filename": clip_path(root, entry.path), "label": entry.label} for entry in entries]

    def _is_on_disk(self) -> bool:
        backends = {getattr(step, "io_backend", "disk") for step in self.pipeline.transforms}
        return backends == {"disk"} and "://" not in str(self.data_prefix.get("video"))

    def prepare_data(self, idx: int) -> Any:
        """The packed sample of a clip, or of the next one that can be read; it then names those passed over.

        Raises:
            InputError: the clip cannot be read; with "skip", more of them than `max_errors` bears.
        """
        unreadable: list[str] = []
        while True:
            info = self.get_data_info(idx)
            name = info["filename"]
            try:
                sample = self.load(info)
            except ClipError as error:
                if self.on_error == "fail":
                    raise InputError(
                        f"clip {name} {error}: replace it, leave it out, or set on_error=skip of the data set"
                    ) from None
                unreadable.append(name)
                if len(unreadable) > self.max_unreadable or len(unreadable) == len(self):
                    raise too_many_unreadable(unreadable, len(self), self.max_unreadable) from None
                idx = (idx + 1) % len(self)
            else:
                if unreadable:
                    sample["data_samples"].set_metainfo({UNREADABLE: unreadable})
                return sample

    def load(self, info: dict[str, Any]) -> Any:
        """What the pipeline makes of a clip.

        Args:
            info: `filename`, `label`, `start_index`, `modality`, as mmaction2 has them.

        Raises:
            ClipError: it cannot be read, or is too short.
        """
        path, result = info["filename"], info
        for step in self.pipeline.transforms:
            result = self.apply(step, result, path)
            if isinstance(step, OPENING) and result["total_frames"] < self.min_frames:
                raise ClipError(f"has {result['total_frames']} frames of at least {self.min_frames}")
            if result is None:
                name = getattr(step, "__name__", type(step).__name__)
                raise InputError(f"the step {name} made nothing of {path}: leave it out of the pipeline")
        return result

    def apply(self, step: Any, results: dict[str, Any], path: str) -> Any:
        """What one step of the pipeline makes of the results of those before it.

        Raises:
            ClipError: the file cannot be read.
        """
        try:
            return step(results)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise at damaged bytes is beyond listing
            if not isinstance(step, READING) or isinstance(error, ImportError):
                raise
            raise explain(read_bytes(path), error, self.decoder) from None


def _first(lines: Sequence[str]) -> str:
    return f"{lines[0]}{f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''}"


def too_many_unreadable(names: Sequence[str], length: int, limit: int) -> InputError:
    return InputError(
        f"{len(names)} of {length} clips cannot be read, max_errors of the data set allows {limit}; the last is "
        f"{names[-1]}: replace them, or raise max_errors; `python -m video.check` lists them"
    )


@METRICS.register_module()
class ClipAccMetric(AccMetric):
    """mmaction2's `AccMetric` over the clips that could be read.

    Where clips were left out, `clips` and `left_out` are two metrics more.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        for sample in data_samples:  # in order: what was padded for several processes is cut off from the end
            if sample.get(UNREADABLE):
                self.results.append(LEFT_OUT)
            else:
                super().process(data_batch, [sample])

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        read = [result for result in results if result["pred"] is not None]
        if not read:
            raise InputError("none of the clips to test on can be read")
        counts = {"clips": len(read), "left_out": len(results) - len(read)} if len(read) < len(results) else {}
        return {**super().compute_metrics(read), **counts}


@HOOKS.register_module()
class UnreadableClipsHook(Hook):
    """Counts the clips that `on_error="skip"` passed over, says so after each epoch, ends a run with too many.

    Each clip counts once, of a resumed run too. The commands register it by themselves.
    """

    def before_run(self, runner: Runner) -> None:
        self.names: dict[str, set[str]] = {mode: set() for mode in ("train", "val", "test")}

    def before_train(self, runner: Runner) -> None:
        if "unreadable_clips" in runner.message_hub.runtime_info:  # of the checkpoint
            self.names["train"].update(runner.message_hub.get_info("unreadable_clips"))
        for mode, loop in (("train", runner._train_loop), ("val", runner._val_loop)):
            if loop is not None and any(data.on_error == "skip" for data in clip_datasets(loop.dataloader.dataset)):
                length, limit = self._limits(runner, mode)
                runner.logger.info(f"on_error = skip: up to {limit} of {length} {mode} clips may be unreadable")

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = "train"
    ) -> None:
        samples = data_batch.get("data_samples", ()) if isinstance(data_batch, Mapping) else ()
        new = {name for sample in samples for name in sample.get(UNREADABLE, ())}
        if not new <= self.names[mode]:
            self._count(runner, new, mode)

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        self._count(runner, {name for names in all_gather_object(self.names[mode]) for name in names}, mode)
        if names := sorted(self.names[mode]):
            happened = "others took their place" if mode == "train" else "they are left out of the accuracy"
            length, _ = self._limits(runner, mode)
            runner.logger.info(  # MMEngine passes on a warning only once
                f"{mode} data: {len(names)} of {length} clips cannot be read, {happened}: {some(names)}"
            )

    def _count(self, runner: Runner, new: set[str], mode: str) -> None:
        self.names[mode] |= new
        if mode == "train":
            runner.message_hub.update_info("unreadable_clips", sorted(self.names[mode]))
        length, limit = self._limits(runner, mode)
        if len(self.names[mode]) > limit:
            raise too_many_unreadable(sorted(self.names[mode]), length, limit)

    @staticmethod
    def _limits(runner: Runner, mode: str) -> tuple[int, int]:
        """Clips of the data, and how many may be unreadable."""
        loop = {"train": runner._train_loop, "val": runner._val_loop, "test": runner._test_loop}[mode]
        datasets = list(clip_datasets(loop.dataloader.dataset))
        return sum(map(len, datasets)), sum(dataset.max_unreadable for dataset in datasets)


def clip_datasets(dataset: Any) -> Iterator[ClipDataset]:
    """Those in what repeats or concatenates them."""
    if isinstance(dataset, ClipDataset):
        yield dataset
        return
    for inner in (*getattr(dataset, "datasets", ()), getattr(dataset, "dataset", None)):
        if inner is not None:
            yield from clip_datasets(inner)


def adapt(cfg: Any) -> None:
    """Let labels be checked against the model's classes, clips that are left out be counted, batches be of any size.

    mmaction2 takes `max_testing_views`, which spares memory, for batches of one alone.

    Raises:
        InputError: a pipeline samples no frames.
    """
    loaders = [cfg.get(f"{part}_dataloader") for part in ("val", "test")]
    if cfg.model.get("test_cfg") and any(loader and loader.get("batch_size", 1) > 1 for loader in loaders):
        cfg.model.test_cfg.pop("max_testing_views", None)
    count = (cfg.model.get("cls_head") or {}).get("num_classes")
    for part in PARTS:
        for dataset in data_of(cfg, part):
            _check_sampling(dataset.get("pipeline") or ())
            if count and type_name(dataset) == ClipDataset.__name__:
                dataset.setdefault("num_classes", count)
        for evaluator in evaluators_of(cfg, part):
            if type_name(evaluator) == "AccMetric":
                evaluator["type"] = ClipAccMetric.__name__
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), {"type": UnreadableClipsHook.__name__}]


def _check_sampling(pipeline: Sequence[Any]) -> None:
    """
    Raises:
        InputError: a step would choose no frames, which the next one would say in its own way.
    """
    for step in pipeline:
        for key in ("clip_len", "frame_interval", "num_clips"):
            value = step.get(key, 1) if isinstance(step, Mapping) else 1
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{key} of {step.get('type')} is {value!r}: give a whole number from 1")
