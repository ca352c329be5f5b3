"""Tests of COCO-style files that a configuration registers as datasets."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2proposals.data.coco_files import register_coco_files
from d2proposals.engine import Trainer, check_datasets, check_evaluations, load_config
from d2proposals.evaluation.voc_evaluator import VOCEvaluator
from tests.common import CONFIGS, make_cfg


@pytest.fixture
def entry(tmp_path):
    """A file with one image of two objects, and what forgets its dataset."""
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    annotations = [
        {"id": number, "image_id": 1, "category_id": number, "bbox": [1, 2, 30, 20], "area": 600,
         "iscrowd": 0}
        for number in (1, 2)
    ]  # fmt: skip
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    yield ["mine_of_coco_files", str(tmp_path / "train.json"), str(tmp_path)]
    if "mine_of_coco_files" in DatasetCatalog.list():
        DatasetCatalog.remove("mine_of_coco_files")
        MetadataCatalog.remove("mine_of_coco_files")


class Arguments:
    config_file = ""
    opts = ()


def test_a_configuration_registers_its_files_any_number_of_times(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    relative, of_home = [entry[0], "train.json", "."], [entry[0], "~/train.json", "~"]
    for files in ([entry], [relative], [tuple(entry)], [of_home]):
        args = Arguments()
        args.config_file = str(CONFIGS / "shapes/rpn_only.yaml")
        args.opts = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", f"('{entry[0]}',)"]
        cfg = load_config(args)
        check_datasets(cfg.DATASETS.TRAIN)
    (record,) = DatasetCatalog.get(entry[0])
    assert record["file_name"] == str(tmp_path / "a.png") and len(record["annotations"]) == 2
    metadata = MetadataCatalog.get(entry[0])
    assert metadata.thing_classes == ["cat", "dog"] and metadata.evaluator_type == "coco"


def test_what_is_wrong_with_an_entry_is_named(entry, tmp_path):
    bad_years = [[[*entry, "2007"]], [[*entry, True]], [[*entry, 2007, 1]]]
    bad_names = [[[1, *entry[1:]]], [["", *entry[1:]]]]
    for wrong in ("text", [entry[:2]], [{"name": "a"}], *bad_names, *bad_years):
        with pytest.raises(ValueError, match=r"COCO_FILES is a list of \[name, JSON file, folder"):
            register_coco_files(wrong)
    register_coco_files([entry])
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ValueError, match="another dataset of the name 'mine_of_coco_files'"):
        register_coco_files([[*entry[:2], str(other)]])
    with pytest.raises(ValueError, match="another dataset of the name 'coco_2017_val'"):
        register_coco_files([["coco_2017_val", *entry[1:]]])
    with pytest.raises(ValueError, match="another dataset of the name 'mine_of_coco_files'"):
        register_coco_files([[*entry, 2007]])


def test_a_year_has_detections_measured_as_voc_does(entry):
    for _ in range(2):
        register_coco_files([[*entry, 2007]])
    assert MetadataCatalog.get(entry[0]).year == 2007
    cfg = make_cfg("faster_rcnn_voc.yaml", "DATASETS.TEST", (entry[0],))
    check_evaluations(cfg, trains=False)
    (evaluator,) = Trainer.build_evaluator(cfg, entry[0])._evaluators
    assert isinstance(evaluator, VOCEvaluator)


@pytest.mark.parametrize("part", [1, 2])
def test_files_that_are_missing_are_named_when_they_are_needed(entry, tmp_path, part):
    entry[part] = str(tmp_path / "gone")
    register_coco_files([entry])
    with pytest.raises(FileNotFoundError, match="needs .*gone, which is missing.*COCO_FILES"):
        check_datasets([entry[0]])
