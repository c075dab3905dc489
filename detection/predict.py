"""Detect objects in pictures: `python -m detection.predict CONFIG CHECKPOINT PICTURE... --out-dir DIR`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvt_backbones.errors import share
from runner import command

if TYPE_CHECKING:
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

PREDICTIONS = "predictions.json"
PICTURES = "pictures"


@command
def main(argv: Sequence[str] | None) -> int:
    """Write `pictures/` with boxes, masks and names drawn in, and `predictions.json` of COCO's results format."""
    from PIL import Image

    from hvt_backbones.images import Reading
    from runner.pictures import plan_pictures, read_pixels, resizing, save_picture
    from runner.run import add_prediction_arguments, build_parser, open_model, write_json

    from .zoo import DETECTION

    parser = build_parser(DETECTION, "predict", "Detect objects in pictures.")
    add_prediction_arguments(parser)
    parser.add_argument(
        "--score-thr", type=share, default=0.3, metavar="S", help="leave out detections below this (default 0.3)"
    )
    args = parser.parse_args(argv)
    plan = plan_pictures(args.pictures, args.out_dir / PICTURES, ".jpg")
    model = open_model(args, DETECTION)
    from mmdet.apis import inference_detector
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    ids = category_ids(model.dataset_meta["classes"], model.cfg)
    results: list[dict[str, Any]] = []
    reading = Reading(args.on_error)

    def detect(path: Path) -> tuple[np.ndarray, DetDataSample]:
        pixels = read_pixels(path)
        with resizing(f"picture {path}"):
            return pixels, inference_detector(model, pixels).cpu()

    for path, target in plan:
        answer = reading.read(detect, path)
        if answer is None:
            continue
        pixels, found = answer
        found.pred_instances = found.pred_instances[found.pred_instances.scores >= args.score_thr]
        visualizer.add_datasample(path.name, pixels[..., ::-1], found, draw_gt=False, pred_score_thr=args.score_thr)
        save_picture(Image.fromarray(visualizer.get_image()), target)
        before = len(results)
        results += coco_results(found, path, ids)
        print(f"{path}: {len(results) - before} objects, drawn in {target}")
    write_json(args.out_dir / PREDICTIONS, results)
    print(f"{len(results)} objects of {len(reading.done)} pictures in {args.out_dir / PREDICTIONS}")
    return reading.status()


def coco_results(found: DetDataSample, path: Path, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What is found in one picture, in COCO's results format, with the name and the path of the file in addition.

    `image_id` is the number that the file is named by, as COCO's are; of another name, the name with its suffix.
    """
    from pycocotools import mask as masks

    instances = found.pred_instances.numpy()
    for index in range(len(instances)):
        left, top, right, bottom = (float(value) for value in instances.bboxes[index])
        result = {
            "image_id": int(path.stem) if path.stem.isdecimal() else path.name,
            "file_name": path.name,
            "path": str(path),
            "category_id": ids[int(instances.labels[index])],
            "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
            "score": round(float(instances.scores[index]), 5),
        }
        if "masks" in instances:
            encoded = masks.encode(instances.masks[index].astype("uint8", order="F"))
            result["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        yield result


def category_ids(classes: Sequence[str], cfg: Config) -> list[int]:
    """The data set's number of each class.

    From the annotations that the configuration names, where they are there; COCO's own, which leave some out, for its
    classes; else 1, 2, 3, ...

    Raises:
        InputError: the annotations are none.
    """
    from hvt_backbones.errors import InputError
    from runner.annotations import read_json
    from runner.parts import data_of

    dataset = next(data_of(cfg, "test"))
    path = Path(dataset.get("data_root") or "") / dataset.get("ann_file", "")
    if path.is_file():
        try:
            numbers = {category["name"]: category["id"] for category in read_json(str(path))["categories"]}
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} has no list of categories with id and name, by which predictions are numbered: mend it, or "
                "give --cfg-options test_dataloader.dataset.ann_file=''"
            ) from error
    else:
        from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

        numbers = {name: index for index, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"])}
    if not set(classes) <= numbers.keys():
        return list(range(1, len(classes) + 1))
    return [numbers[name] for name in classes]


if __name__ == "__main__":
    raise SystemExit(main())
