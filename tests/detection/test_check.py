"""COCO files as people have them: each oddity is said by check, and refused, told or mended before it trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools import mask as masks

from detection.check import main
from hvt_backbones.errors import InputError
from runner import annotation_guard, findings, patches
from tests.dense_runs import CATEGORY_IDS, CLASSES, SIDE, draw_coco, write_config
from tests.detection.conftest import settings

Content = dict[str, Any]
Change = Callable[[Content], Any]


def each(key: str, **values: Any) -> Change:
    return lambda content: [one.update(values) for one in content[key]]


def every(key: str, change: Change) -> Change:
    return lambda content: [change(one) for one in content[key]]


def first(**values: Any) -> Change:
    return lambda content: content["annotations"][0].update(values)


def without(key: str) -> Change:
    return every("annotations", lambda one: one.pop(key))


def write(folder: Path, change: Change, splits: tuple[str, ...] = ("train2017", "val2017")) -> dict[str, Any]:
    """The tiny data set with other annotations; its configuration."""
    draw_coco(folder / "coco", {"train2017": 3, "val2017": 2})
    for split in splits:
        path = folder / f"coco/annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return settings(str(folder / "coco"))


def load(cfg: dict[str, Any], part: str = "train") -> Any:
    """A data set as a training builds it."""
    patches.apply("mmdet")
    init_default_scope("mmdet")
    return DATASETS.build(cfg[f"{part}_dataloader"]["dataset"])


def rle(height: int, width: int) -> dict[str, Any]:
    """A mask as crowds have it in COCO: not compressed."""
    return {"size": [height, width], "counts": [100, 50, SIDE * SIDE - 150]}


def encoded(side: int, pixels: int = 0) -> str:
    """A square mask as pycocotools writes it."""
    mask = np.zeros((side, side), np.uint8, order="F")
    mask.flat[:pixels] = 1
    return masks.encode(mask)["counts"].decode()


WRONG = {
    "no annotations": (lambda c: c.pop("annotations"), "the key 'annotations' is missing"),
    "no categories": (lambda c: c.pop("categories"), "the key 'categories' is missing"),
    "lists of another form": (lambda c: c.update(images={"1": {}}), "'images' is no list of dictionaries"),
    "equal ids": (each("images", id=0), "000000000000.jpg and 000000000001.jpg have the same id 0"),
    "ids as text": (every("images", lambda i: i.update(id=str(i["id"]))), "000000000000.jpg has the id '0'"),
    "picture's id as text": (
        every("annotations", lambda a: a.update(image_id=str(a["image_id"]))), "annotation 1 has the image_id '0'",
    ),
    "class as text": (first(category_id="3"), "annotation 1 has the category_id '3'"),
    "unknown class": (first(category_id=99), "annotation 1 has the category_id 99, categories have 3, 7"),
    "equal categories": (each("categories", id=3), "the categories disc and box have the same id 3"),
    "category without name": (lambda c: c["categories"][0].pop("name"), "the id 3 and the name None"),
    "classes in another order": (
        lambda c: c["categories"].reverse(), "the categories are in the order box, disc, the classes disc, box",
    ),
    "no file name": (lambda c: c["images"][0].pop("file_name"), "the picture of id 0 has the file_name None"),
    "no size": (every("images", lambda i: (i.pop("height"), i.pop("width"))), "has height None and width None"),
    "size of another": (each("images", height=20, width=300), "000000000000.jpg is 64 x 64 pixels, not 20 x 300"),
    "no box": (lambda c: c["annotations"][1].pop("bbox"), "annotation 2 has the bbox None"),
    "box of three": (first(bbox=[1, 2, 3]), "annotation 1 has the bbox [1, 2, 3]"),
    "box that is no number": (first(bbox=[1, 2, float("nan"), 3]), "annotation 1 has the bbox [1, 2, nan, 3]"),
    "box of negative width": (first(bbox=[30, 2, -3, 3]), "annotation 1 has the bbox [30, 2, -3, 3]"),
    "boxes as shares": (each("annotations", bbox=[0.1, 0.2, 0.5, 0.4]), "objects are like that"),
    "boxes outside": (each("annotations", bbox=[900, 900, 9, 9]), "in a picture of 64 x 64, and"),
    "areas of 0": (each("annotations", area=0), "annotation 1 has the area 0"),
    "crowd as text": (first(iscrowd="0"), "annotation 1 has the iscrowd '0'"),
    "no masks": (without("segmentation"), "annotation 1 has no segmentation"),
    "a flat polygon": (first(segmentation=[1, 1, 20, 1, 20, 20]), "annotation 1 has a segmentation that is no list of"),
    "a polygon with text": (first(segmentation=[[1, 1, 20, "1", 20, 20]]), "that is no list of lists of numbers"),
    "run lengths that are none": (first(segmentation={"size": [SIDE, SIDE], "counts": [["9"]]}), "the counts [['9']]"),
    "run lengths of another size": (first(segmentation=rle(32, 64)), "annotation 1 has a mask of size [32, 64] in a"),
    "run lengths that end early": (
        first(segmentation={"size": [SIDE, SIDE], "counts": [9, 9]}), "annotation 1 has counts of 18 pixels in a",
    ),
    "run lengths as fractions": (
        first(segmentation={"size": [SIDE, SIDE], "counts": [0.5, SIDE * SIDE - 0.5]}), "the counts [0.5, 4095.5]",
    ),
    "run lengths below 0": (
        first(segmentation={"size": [SIDE, SIDE], "counts": [-4, SIDE * SIDE + 4]}), "the counts [-4, 4100]",
    ),
    "text of run lengths of another size": (
        first(segmentation={"size": [SIDE, SIDE], "counts": encoded(32)}), "has counts of 1024 pixels in a",
    ),
    "text that is no run lengths": (first(segmentation={"size": [SIDE, SIDE], "counts": "größer"}), "counts 'größer'"),
    "numbers beyond all": (first(bbox=[1, 2, 10**400, 3]), "annotation 1 has the bbox [1, 2, 1000"),
    "equal names": (each("categories", name="disc"), "two categories, of which one has the id 7, have the name disc"),
    "no object": (lambda c: c.update(annotations=[]), "0 annotations have no object of the classes"),
    "pictures not listed": (each("annotations", image_id=77), "annotations have no object of the classes"),
}  # fmt: skip
IN_TRAINING_ALONE = ("no annotations", "no object")


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_said_and_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    change, words = WRONG[case]
    cfg = write(tmp_path, change)
    config = write_config(tmp_path / "tiny.py", cfg)
    assert main([str(config), "--workers", "0"]) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  wrong: ")]
    assert any(words in line for line in said), said
    for part in ("train",) if case in IN_TRAINING_ALONE else ("train", "val"):
        with pytest.raises(InputError) as caught:
            load(cfg, part)
        file = "instances_train2017.json: " if part == "train" else "instances_val2017.json: "
        assert file in str(caught.value)
        assert words in str(caught.value)


def test_a_metric_of_another_file_knows_the_classes_before_training(tmp_path: Path) -> None:
    write(tmp_path, lambda content: content["categories"][1].update(name="ball"))
    patches.apply("mmdet")
    metric = CocoMetric(ann_file=str(tmp_path / "coco/annotations/instances_val2017.json"))
    with pytest.raises(InputError, match=r"val2017.json: it has 1 of the 2 classes, not box: name those"):
        metric.dataset_meta = {"classes": CLASSES}


def test_a_file_that_is_no_json_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = write(tmp_path, lambda content: None)
    file = tmp_path / "coco/annotations/instances_train2017.json"
    file.write_text(file.read_text()[:-20])
    assert main([str(write_config(tmp_path / "tiny.py", cfg))]) == 2
    assert f"{file} is no JSON (JSONDecodeError: " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"instances_train2017.json is no JSON \(JSONDecodeError: "):
        load(cfg)


def numbered(start: int) -> Change:
    return lambda content: [one.update(id=number) for number, one in enumerate(content["annotations"], start)]


MENDED = {
    "ids from 0": (numbered(0), "an annotation has the id 0: all annotations numbered from 1 in memory"),
    "equal annotation ids": (each("annotations", id=5), "several annotations have the id 5: all"),
    "annotation ids as text": (every("annotations", lambda a: a.update(id=f"a{a['id']}")), "has the id 'a1': all"),
    "no annotation ids": (without("id"), "has the id None: all"),
    "no iscrowd": (without("iscrowd"), "has no iscrowd"),
    "no area": (without("area"), "has the area None"),
    "a picture listed twice": (
        lambda c: c["images"].append({**c["images"][0], "id": 99}), "000000000000.jpg has the ids 0 and 99: the",
    ),
    "area of null": (first(area=None), "annotation 1 has the area None: computed from its mask or box"),
    "a polygon of two points beside": (
        lambda c: c["annotations"][0]["segmentation"].insert(0, [1, 1, 9, 9]), "polygon of 4 numbers beside sound ones",
    ),
}  # fmt: skip


def evaluate(file: Path) -> dict[str, float]:
    """The truth as its own prediction."""
    content = json.loads(file.read_text())
    metric = CocoMetric(ann_file=str(file), metric=["bbox", "segm"])
    metric.dataset_meta = {"classes": CLASSES}
    for image in content["images"]:
        found = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        polygons = [[part for part in one["segmentation"] if len(part) >= 6] for one in found]
        drawn = [masks.merge(masks.frPyObjects(parts, SIDE, SIDE)) for parts in polygons]
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = {
            "bboxes": boxes, "scores": torch.full((len(found),), 0.9), "masks": drawn,
            "labels": torch.tensor([CATEGORY_IDS.index(one["category_id"]) for one in found]),
        }  # fmt: skip
        metric.process({}, [{"img_id": image["id"], "ori_shape": (SIDE, SIDE), "pred_instances": instances}])
    return metric.evaluate(len(content["images"]))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a training logs about its data."""
    lines: list[str] = []
    monkeypatch.setattr(annotation_guard, "print_log", lambda line, logger, level: lines.append(line))
    return lines


@pytest.mark.parametrize("case", MENDED)
def test_what_is_mended_counts_in_full(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture, told: list[str]
) -> None:
    change, words = MENDED[case]
    cfg = write(tmp_path, change)
    samples = load(cfg)
    sound = load(write(tmp_path / "sound", lambda content: None))
    for index in range(len(sound)):
        ours, theirs = (data[index]["data_samples"].gt_instances for data in (samples, sound))
        assert torch.equal(ours.bboxes.tensor, theirs.bboxes.tensor)
        assert (ours.masks.masks == theirs.masks.masks).all()
    assert len(told) == 1
    assert words in told[0]
    scores = evaluate(tmp_path / "coco/annotations/instances_val2017.json")
    assert scores["coco/bbox_mAP"] == scores["coco/segm_mAP"] == 1.0
    assert main([str(write_config(tmp_path / "tiny.py", cfg)), "--workers", "0"]) == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("mask", [[], {}, [[1, 1, 20, 20]], [[1, 1, 9]], None, "text"])
def test_an_object_without_a_mask_is_not_learned_and_counts_by_its_box(
    mask: Any, tmp_path: Path, told: list[str]
) -> None:
    cfg = write(tmp_path, lambda content: content["annotations"][1].update(segmentation=mask))
    box = torch.tensor(json.loads((tmp_path / "coco/annotations/instances_train2017.json").read_text())
                       ["annotations"][1]["bbox"])  # fmt: skip
    packed = load(cfg)[1]["data_samples"]
    assert len(packed.gt_instances) == len(packed.ignored_instances) == 1
    assert torch.equal(packed.ignored_instances.bboxes.tensor[0, :2], box[:2].float())
    assert "annotation 2 has " in told[0]
    assert "taken for a crowd" in told[0]
    file = tmp_path / "coco/annotations/instances_val2017.json"
    metric = CocoMetric(ann_file=str(file), metric=["bbox", "segm"])
    ours = metric._coco_api.anns[2]
    left, top, width, height = ours["bbox"]
    expected = np.zeros((SIDE, SIDE), np.uint8)
    expected[top : top + height, left : left + width] = 1
    assert ours["iscrowd"] == 0
    assert (metric._coco_api.annToMask(ours) == expected).all()
    assert "annotation 2 has " in told[1]
    assert "its box counts as its mask" in told[1]


def odd_but_sound(content: Content) -> None:
    """What COCO itself has, and what people add to it."""
    images, annotations = content["images"], content["annotations"]
    images[0]["file_name"] = f"sub folder/Füchse_狐_{images[0]['file_name']}"
    images.append({**images[1], "id": 10**12})  # without objects
    content["categories"].append({"id": 90, "name": "not asked for"})
    more = [
        {"bbox": [5.5, 5.25, 1, 12.0], "segmentation": [[5.5, 5, 6.5, 5, 6.5, 17, 5.5, 17]]},
        {"bbox": [3, 3, 0, 9], "segmentation": [[3, 3, 3, 12, 3, 12]], "area": 0},
        {"bbox": [SIDE + 5, SIDE + 5, 20, 20]},
        {"bbox": [SIDE - 8, SIDE - 8, 20, 20]},
        {"bbox": [-6, -4, 20, 14]},
        {"bbox": [0, 0, 30, 30], "segmentation": rle(SIDE, SIDE), "iscrowd": 1},
        {"bbox": [0, 0, SIDE, 9], "segmentation": {"size": [SIDE, SIDE], "counts": encoded(SIDE, 9 * SIDE + 5)}},
        {"bbox": [0, 0, 30, 30], "category_id": 90},
        {"bbox": [0, 0, 30, 30], "image_id": 12345},
    ]
    for _ in range(3):
        annotations += [{**one, "id": len(annotations) + 1} for one in annotations[:4]]
    for number, one in enumerate(more):
        annotations.append({**annotations[0], **one, "id": 900000000 + number * 13})


def test_the_oddities_of_real_files_are_no_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "CHUNK", 1)  # so that two processes share the few pictures
    cfg = write(tmp_path, odd_but_sound)
    for split in ("train2017", "val2017"):
        folder = tmp_path / "coco" / split
        (folder / "sub folder").mkdir()
        picture = folder / "000000000000.jpg"
        picture.rename(folder / "sub folder" / f"Füchse_狐_{picture.name}")
    turned = tmp_path / "coco/train2017/000000000001.jpg"
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(turned).resize((SIDE, 48)).save(turned, exif=exif)
    file = tmp_path / "coco/annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for size in ((SIDE, 48), (48, SIDE)):  # of the file as it is stored, and upright
        for image in content["images"][1::2]:
            image["height"], image["width"] = size
        file.write_text(json.dumps(content))
        told.clear()
        load(cfg)
        assert len(told) <= 1
    assert main([str(write_config(tmp_path / "tiny.py", cfg)), "--workers", "2"]) == 0
    assert "  wrong" not in capsys.readouterr().out


def test_check_reads_all_of_any_type(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = write(tmp_path, lambda content: None)
    train, root = cfg["train_dataloader"], tmp_path / "voc"
    broken = tmp_path / "coco/train2017/000000000002.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])
    (root / "VOC2007").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (40, 30)).save(root / "VOC2007" / f"{name}.jpg")
        (root / "VOC2007" / f"{name}.xml").write_text(
            f"<annotation><size><width>{40 if name == 'a' else 41}</width><height>30</height></size><object>"
            "<name>disc</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"
        )
    (root / "list.txt").write_text("a\nb\n")
    voc = {
        "type": "XMLDataset", "data_root": str(root), "ann_file": "list.txt", "img_subdir": "", "ann_subdir": "",
        "data_prefix": {"sub_data_root": "VOC2007/"}, "metainfo": {"classes": CLASSES}, "pipeline": [],
    }  # fmt: skip
    both = {"type": "ConcatDataset", "datasets": [train["dataset"], voc]}
    cfg["train_dataloader"] = {
        **train,
        "dataset": {"type": "ClassBalancedDataset", "oversample_thr": 0.1, "dataset": both},
    }
    other = tmp_path / "other.json"
    content = json.loads((tmp_path / "coco/annotations/instances_val2017.json").read_text())
    other.write_text(json.dumps({**content, "images": []}))
    cfg["test_evaluator"] = {**cfg["test_evaluator"], "ann_file": str(other)}
    config = write_config(tmp_path / "tiny.py", cfg)
    assert main([str(config), "--workers", "0", "--json", str(tmp_path / "found.json")]) == 1
    out = capsys.readouterr().out
    assert f"wrong: {broken} cannot be read (image file is truncated" in out
    assert "b.jpg is 30 x 40 pixels, not 30 x 41 as annotated" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["counts"] for one in found["train"]] == [{"disc": 3, "box": 1}, {"disc": 2, "box": 0}]
    assert not [one for one in found["val"][0]["findings"] if one["wrong"]]
    assert found["test_evaluator"][0]["findings"][0]["found"][0].startswith("annotation 1 has the image_id 0, which")
    assert main([str(config), "--workers", "0", "--quick"]) == 1  # for the size alone
    assert "truncated" not in capsys.readouterr().out
