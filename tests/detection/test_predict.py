"""`python -m detection.predict`: results, pictures, numbers of categories, and what is read how."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as masks
from pycocotools.coco import COCO

from detection.predict import category_ids
from detection.predict import main as predict
from hvt_backbones.errors import InputError
from tests.dense_runs import CATEGORY_IDS, SIDE, error_line
from tests.detection.test_commands import CPU, checkpoint


@pytest.mark.slow
def test_predict_draws_and_writes_coco_results(config: Path, trained: Path, coco: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    Image.open(coco / "val2017" / "000000000000.jpg").resize((96, 48)).convert("L").save(other / "grey.png")
    arguments = [str(config), checkpoint(trained), str(coco / "val2017"), str(other / "grey.png"), *CPU]
    assert predict([*arguments, "--out-dir", str(tmp_path / "out"), "--score-thr", "0.02"]) == 0
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {result["file_name"] for result in results} == {"000000000000.jpg", "000000000001.jpg", "grey.png"}
    assert {result["category_id"] for result in results} <= set(CATEGORY_IDS)
    assert min(result["score"] for result in results) >= 0.02
    for result in results:
        width, height = (96, 48) if result["file_name"] == "grey.png" else (SIDE, SIDE)
        left, top, box_width, box_height = result["bbox"]
        assert 0 <= left <= left + box_width <= width + 0.02
        assert 0 <= top <= top + box_height <= height + 0.02
        assert masks.decode(result["segmentation"]).shape == (height, width)
    of_data_set = [result for result in results if result["file_name"] != "grey.png"]
    loaded = COCO(str(coco / "annotations" / "instances_val2017.json")).loadRes(of_data_set)
    assert len(loaded.getAnnIds()) == len(of_data_set)
    for path in (coco / "val2017").glob("*.jpg"):
        drawn = next((tmp_path / "out" / "pictures").rglob(path.name))
        before, after = (np.asarray(Image.open(file), dtype=int) for file in (path, drawn))
        assert before.shape == after.shape
        assert np.abs(before - after).max() > 40
    everything = len(results)
    assert predict([*arguments, "--out-dir", str(tmp_path / "sure"), "--score-thr", "0.99"]) == 0
    assert len(json.loads((tmp_path / "sure" / "predictions.json").read_text())) < everything


def test_predict_does_not_draw_over_its_pictures(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    Image.new("RGB", (8, 8)).save(folder / "b.jpg")
    assert predict([str(config), "none.pth", str(folder), "--out-dir", str(tmp_path)]) == 2
    assert "would be overwritten" in error_line(capfd)


def test_predict_reads_on_and_draws_pictures_of_one_stem(
    config: Path, trained: Path, coco: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    sound = Image.open(coco / "val2017" / "000000000000.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    sound.resize((60, 40)).save(folder / "a.jpg", exif=exif)
    sound.save(folder / "a.png")
    (folder / "b.jpg").write_bytes((coco / "val2017" / "000000000000.jpg").read_bytes()[:50])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "c.tif")
    sound.save(folder / "d.jpg")
    Image.new("RGB", (3000, 1)).save(folder / "e.png")  # of which the pipeline would leave no row
    command = [str(config), checkpoint(trained), str(folder), *CPU, "--score-thr", "0.02", "--out-dir"]
    assert predict([*command, str(tmp_path / "out")]) == 1
    said = capfd.readouterr().err
    assert [line.split()[2] for line in said.splitlines() if line.startswith("error: ")] == [
        str(folder / "b.jpg"), str(folder / "c.tif"), str(folder / "e.png")
    ]  # fmt: skip
    assert "3 of 6 files were left out" in said
    drawn = tmp_path / "out" / "pictures"
    assert sorted(path.name for path in drawn.iterdir()) == ["a.jpg.jpg", "a.png.jpg", "d.jpg"]
    assert Image.open(drawn / "a.jpg.jpg").size == (40, 60)
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(result["image_id"], Path(result["path"]).name) for result in results} == {
        (name, name) for name in ("a.jpg", "a.png", "d.jpg")
    }
    assert predict([*command, str(tmp_path / "strict"), "--on-error", "fail"]) == 2
    assert f"picture {folder / 'b.jpg'} cannot be read" in error_line(capfd)


@pytest.mark.parametrize("content", ["[]", '{"categories": [{"id": 1}]}', "no JSON"])
def test_predict_numbers_by_annotations_or_says_what_is_wrong_with_them(
    content: str, config: Path, tmp_path: Path
) -> None:
    cfg = Config.fromfile(config)
    cfg.test_dataloader.dataset.update(data_root=str(tmp_path), ann_file="broken.json")
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(InputError, match=r"broken\.json (has no list of categories|is no JSON)"):
        category_ids(["disc"], cfg)
    cfg.test_dataloader.dataset.ann_file = ""
    assert category_ids(["disc"], cfg) == [1]


@pytest.mark.parametrize("kind", ["png", "tiff"])  # of TIFFs OpenCV ignores what it is told
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_read_as_they_were_annotated(turn: int, kind: str, tmp_path: Path) -> None:
    from mmcv.transforms import LoadImageFromFile

    from hvt_backbones.images import read_image
    from runner import patches
    from runner.pictures import read_pixels

    patches.apply("mmdet")
    path, exif = tmp_path / f"a.{kind}", Image.Exif()
    exif[0x0112] = turn
    stored = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(stored).save(path, exif=exif)
    upright = np.array(read_image(path))
    assert upright.shape[:2] == ((30, 20) if turn >= 5 else (20, 30))
    assert np.array_equal(read_pixels(path)[..., ::-1], upright)

    def load(height: int, width: int) -> np.ndarray:
        given = {"img_path": str(path), "height": height, "width": width, "instances": []}
        return LoadImageFromFile().transform(given)["img"][..., ::-1]

    assert np.array_equal(load(20, 30), stored)  # upside down and mirrored, too
    if turn >= 5:
        assert np.array_equal(load(30, 20), upright)
    with pytest.raises(InputError, match=rf"40 x 30 pixels, its picture .*a\.{kind}"):
        load(40, 30)


def test_cocos_own_numbers_are_known_without_its_files() -> None:
    from mmdet.datasets import CocoDataset
    from mmengine.config import Config

    cfg = Config({"test_dataloader": {"dataset": {"data_root": "nowhere", "ann_file": "x.json"}}})
    ids = category_ids(CocoDataset.METAINFO["classes"], cfg)
    assert (len(ids), ids[0], ids[11], ids[-1]) == (80, 1, 13, 90)
    assert category_ids(["disc", "box"], cfg) == [1, 2]
