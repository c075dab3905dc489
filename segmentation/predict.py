"""Segment pictures: `python -m segmentation.predict CONFIG CHECKPOINT PICTURE... --out-dir DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner import command

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

PREDICTIONS = "predictions.json"
OVERLAYS = "overlays"
LABELS = "labels"


@command
def main(argv: Sequence[str] | None) -> int:
    """Write `overlays/` with the classes' colours, `labels/` with a class per pixel, and `predictions.json`."""
    import numpy as np
    from PIL import Image

    from hvt_backbones.images import Reading
    from runner.parts import data_of
    from runner.pictures import plan_pictures, read_pixels, resizing, save_picture
    from runner.run import add_prediction_arguments, build_parser, open_model, write_json

    from .zoo import SEGMENTATION

    parser = build_parser(SEGMENTATION, "predict", "Segment pictures.")
    add_prediction_arguments(parser)
    args = parser.parse_args(argv)
    plan = plan_pictures(args.pictures, args.out_dir / OVERLAYS, ".jpg")
    label_files = plan_pictures(args.pictures, args.out_dir / LABELS, ".png")
    model = open_model(args, SEGMENTATION)
    from mmseg.apis import inference_model

    # mmsegmentation looks for the pipeline here
    pipeline = next(data_of(model.cfg, "test"))["pipeline"]
    model.cfg.test_pipeline = [step for step in pipeline if step["type"] != "LoadAnnotations"]
    classes = model.dataset_meta["classes"]
    palette = np.array(model.dataset_meta["palette"], dtype=np.uint8)
    results, reading = [], Reading(args.on_error)

    def segment(path: Path) -> tuple[np.ndarray, np.ndarray]:
        pixels = read_pixels(path)
        with resizing(f"picture {path}"):
            found = inference_model(model, pixels)
        return pixels, found.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)

    for (path, overlay), (_, label_file) in zip(plan, label_files, strict=True):
        answer = reading.read(segment, path)
        if answer is None:
            continue
        pixels, labels = answer
        save_picture(Image.fromarray((pixels[..., ::-1] // 2 + palette[labels] // 2).astype(np.uint8)), overlay)
        indexed = Image.fromarray(labels, mode="P")
        indexed.putpalette(palette.flatten().tolist())
        save_picture(indexed, label_file)
        results.append(
            {"file_name": path.name, "path": str(path), "size": list(labels.shape), "classes": shares(labels, classes)}
        )
        print(f"{path}: {', '.join(list(results[-1]['classes'])[:5])}, drawn in {overlay}")
    write_json(args.out_dir / PREDICTIONS, results)
    print(f"{len(results)} pictures in {args.out_dir / PREDICTIONS}")
    return reading.status()


def shares(labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Class -> its share of the pixels, the largest first; classes that are not in the picture are left out."""
    import numpy as np

    present, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {classes[present[index]]: round(float(counts[index] / labels.size), 6) for index in order}


if __name__ == "__main__":
    raise SystemExit(main())
