"""Recognize actions in clips: `python -m video.predict CONFIG CHECKPOINT CLIP... --out-dir DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvt_backbones.errors import InputError
from runner import command

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .clips import ClipDataset

PREDICTIONS = "predictions.json"
STRIPS = "strips"
TOP = 5
STRIP_FRAMES, GIF_FRAMES = 8, 32
FRAME_HEIGHT = 160  # pixels
LINE_HEIGHT = 18


@command
def main(argv: Sequence[str] | None) -> int:
    """Write `strips/`, frames of each clip with the best classes below, and `predictions.json`."""
    import torch
    from mmengine.dataset import pseudo_collate

    from hvt_backbones.atomic import whole_file
    from hvt_backbones.images import Reading
    from runner.pictures import plan_pictures, save_picture
    from runner.run import add_prediction_arguments, build_parser, open_model, write_json

    from .decoders import ClipError, find_videos
    from .zoo import VIDEO

    parser = build_parser(VIDEO, "predict", "Recognize actions in clips.")
    add_prediction_arguments(parser, "clip")
    parser.add_argument("--gif", action="store_true", help="write moving pictures instead of strips of frames")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="a class name a line (default: the checkpoint's, else numbers)"
    )
    args = parser.parse_args(argv)
    plan = plan_pictures(args.clips, args.out_dir / STRIPS, ".gif" if args.gif else ".jpg", find_videos)
    names = read_labels(args.labels) if args.labels else None
    model = open_model(args, VIDEO, needs_classes=False)
    dataset = open_dataset(model.cfg)
    names = names or list(model.dataset_meta.get("classes") or ())
    results: list[dict[str, Any]] = []
    reading = Reading(args.on_error)

    def load(path: Path) -> tuple[dict[str, Any], list[np.ndarray], float]:
        try:
            return dataset.load(_info(path)), *read_frames(dataset, path, GIF_FRAMES if args.gif else STRIP_FRAMES)
        except ClipError as error:
            raise InputError(f"clip {path} {error}: replace it or leave it out") from error

    for path, target in plan:
        loaded = reading.read(load, path)
        if loaded is None:
            continue
        data, frames, seconds = loaded
        with torch.inference_mode():
            scores = model.test_step(pseudo_collate([data]))[0].pred_score.float().cpu()
        if names and len(names) != len(scores):
            raise InputError(
                f"{args.labels or args.checkpoint} names {len(names)} classes, the model has {len(scores)}"
            )
        best = scores.topk(min(TOP, len(scores)))
        top = [
            {"label": label, "class": names[label] if names else str(label), "score": round(score, 5)}
            for score, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        lines = [f"{one['score']:6.1%}  {one['class']}" for one in top]
        if args.gif:
            pictures = [annotate([frame], lines) for frame in frames]
            with whole_file(target) as partial:
                pictures[0].save(
                    partial, save_all=True, append_images=pictures[1:], loop=0,
                    duration=max(20, round(1000 * seconds / len(pictures))),
                )  # fmt: skip
        else:
            save_picture(annotate(frames, lines), target)
        results.append({"file_name": path.name, "path": str(path), "top": top})
        print(f"{path}, drawn in {target}")
        print("\n".join(f"  {line}" for line in lines))
    write_json(args.out_dir / PREDICTIONS, results)
    print(f"{len(results)} clips in {args.out_dir / PREDICTIONS}")
    return reading.status()


def read_labels(path: Path) -> list[str]:
    """The names in a file, a line each.

    Raises:
        InputError: it is no text, or empty.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise InputError(f"--labels {path} does not exist: check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--labels {path} is no text: give a file with a class name a line") from error
    if not names:
        raise InputError(f"--labels {path} is empty: give a file with a class name a line")
    return names


def open_dataset(cfg: Any) -> ClipDataset:
    """The test data of a configuration, for its pipeline: no list is read."""
    from mmengine.registry import DATASETS

    from runner.config import building
    from runner.parts import data_of

    dataset = next(data_of(cfg, "test"))
    with building(cfg.filename):
        return DATASETS.build({**dataset, "type": "mmaction.ClipDataset", "lazy_init": True})


def _info(path: Path) -> dict[str, Any]:
    return {"filename": str(path), "label": -1, "start_index": 0, "modality": "RGB"}


def read_frames(dataset: ClipDataset, path: Path, count: int) -> tuple[list[np.ndarray], float]:
    """At most `count` evenly spaced frames of a clip, (H, W, 3) uint8, and its seconds.

    Raises:
        ClipError: they cannot be read, though others may.
    """
    import numpy as np

    from .clips import OPENING, READING

    results: dict[str, Any] = _info(path)
    for step in dataset.pipeline.transforms:
        if isinstance(step, READING):
            results = dataset.apply(step, results, str(path))
        if isinstance(step, OPENING):
            total = results["total_frames"]
            results["frame_inds"] = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    return list(results["imgs"]), total / (results.get("avg_fps") or 25.0)


def annotate(frames: Sequence[np.ndarray], lines: Sequence[str]) -> Image.Image:
    """The frames side by side, the lines of text below."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames[0].shape[:2]
    size = (max(1, round(FRAME_HEIGHT * width / height)), FRAME_HEIGHT)
    font = ImageFont.load_default(LINE_HEIGHT - 4)
    width = max(size[0] * len(frames), *(12 + int(font.getlength(line)) for line in lines))
    strip = Image.new("RGB", (width, FRAME_HEIGHT + LINE_HEIGHT * len(lines) + 8), "black")
    for index, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), (index * size[0], 0))
    pen = ImageDraw.Draw(strip)
    for index, line in enumerate(lines):
        pen.text((6, FRAME_HEIGHT + 4 + index * LINE_HEIGHT), line, fill="yellow" if index == 0 else "white", font=font)
    return strip


if __name__ == "__main__":
    raise SystemExit(main())
