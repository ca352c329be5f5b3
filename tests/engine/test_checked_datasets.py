"""Tests of datasets with annotations that would end or spoil a training."""

import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from d2proposals.data.mapper import ProposalDatasetMapper
from d2proposals.engine import Trainer
from d2proposals.engine.checked_datasets import (
    checked_dataset,
    own_name,
    records_to_test,
    with_checked_datasets,
)
from tests.common import make_cfg

WIDTH, HEIGHT = 80, 64
BOX = [10, 10, 20, 30]
SQUARE = [10, 10, 30, 10, 30, 40, 10, 40]
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def annotation(number, image_id=1, bbox=BOX, **extra):
    return {"id": number, "image_id": image_id, "category_id": 1, "bbox": bbox, "area": 600,
            "iscrowd": 0, **extra}  # fmt: skip


@pytest.fixture
def registered(tmp_path, request):
    """A function that registers a COCO-style file of two images as Detectron2 does."""
    names = set(DatasetCatalog.list())
    for image_id in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(tmp_path / f"{image_id}.png")

    def register(annotations, name=None, categories=CATEGORIES, **of_images):
        name = name or f"made for {request.node.name}"
        images = [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH, **of_images}
            for i in (1, 2)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = tmp_path / f"{len(DatasetCatalog.list())}.json"
        path.write_text(json.dumps(content))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        return name

    yield register
    for name in set(DatasetCatalog.list()) - names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(train, test=(), *overrides):
    names = ("DATASETS.TRAIN", (train,) if train else (), "DATASETS.TEST", test)
    return make_cfg("shapes/rpn_only.yaml", *names, *overrides)


def first_batch(cfg):
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 2])
    return next(iter(Trainer.build_train_loader(cfg)))


def num_objects(records):
    return [len(record["annotations"]) for record in records]


# Named by its fault, with how many objects of the first image are left beside a good one.
BAD = {
    "gt-not-finite": (annotation(2, bbox=[float("nan"), 1, 5, 5]), 1),
    "gt-negative-side": (annotation(2, bbox=[30, 30, 5, -4]), 1),
    "gt-no-box": (annotation(2, bbox=None), 1),
    "gt-box-of-mask": (
        {k: v for k, v in annotation(2, segmentation=[SQUARE]).items() if k != "bbox"}, 2,
    ),
    "gt-category": (annotation(2, category_id=9), 1),
    "gt-flag": (annotation(2, iscrowd="0"), 2),
    "gt-text": (annotation(2, bbox=["1", "2", "30.5", "4"]), 2),
    "gt-ignore": (annotation(2, ignore=1), 2),
    "gt-same-id": (annotation(1, image_id=1), 2),
    "gt-no-mask": (
        annotation(2, segmentation={"size": [5, 5], "counts": "a1"}), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_detectron2_stops_at_is_mended_or_left_out(registered, caplog, name):
    bad, number = BAD[name]
    good = annotation(1, segmentation=[SQUARE])
    dataset = registered([good, bad, annotation(3, image_id=2)])
    with caplog.at_level(logging.WARNING):
        records = DatasetCatalog.get(checked_dataset(config(dataset), dataset, "TRAIN"))
    assert num_objects(records) == [number, 1]
    named = [record.message for record in caplog.records if f"[{name}] 1 annot" in record.message]
    assert len(named) == 1 and "The first: annotation" in named[0]
    # The same through the loader.
    batch = first_batch(config(dataset))
    expected = {1: number - (name == "gt-ignore"), 2: 1}
    for item in batch:
        assert len(item["instances"]) == expected[item["image_id"]]
    with pytest.raises(ValueError, match=rf"DATASETS.STRICT, and .*\[{name}\] 1 annotations"):
        Trainer.build_train_loader(config(dataset, (), "DATASETS.STRICT", True))


def test_ignored_regions_are_neither_objects_nor_background(registered):
    dataset = registered([annotation(1), annotation(2, bbox=[40, 20, 8, 9], ignore=1)])
    name = checked_dataset(config(dataset), dataset, "TRAIN")
    mapper = ProposalDatasetMapper(config(dataset, (), "INPUT.MIN_SIZE_TRAIN", (HEIGHT,)), True)
    instances = mapper(DatasetCatalog.get(name)[0])["instances"]
    assert len(instances) == 1 and len(instances.crowd_regions.boxes) == 1


@pytest.mark.parametrize(
    ("of_images", "mended"),
    [
        ({"height": "64", "width": "80"}, True),
        ({"height": 64.0, "width": 80.0}, True),
        ({"height": -1}, True),
        ({"height": None}, True),
        ({}, False),
    ],
)
def test_sizes(registered, of_images, mended):
    dataset = registered([annotation(1), annotation(2, image_id=2)], **of_images)
    name = checked_dataset(config(dataset), dataset, "TRAIN")
    assert (name != dataset) == mended
    sizes = {(x.get("height"), x.get("width")) for x in DatasetCatalog.get(name)}
    # What is missing, or no size, is read from the images.
    # Where the annotations do not tell, the image's file does.
    assert sizes == {(HEIGHT, WIDTH)}
    for item in first_batch(config(dataset)):
        assert (item["height"], item["width"]) == (HEIGHT, WIDTH) and len(item["instances"]) == 1


def test_a_good_dataset_is_read_by_detectron2(registered, caplog):
    dataset = registered([annotation(k, k + 1, segmentation=[SQUARE]) for k in (0, 1)])
    cfg = config(dataset, (dataset,), "DATASETS.STRICT", True)
    with caplog.at_level(logging.WARNING, "d2proposals"):
        assert with_checked_datasets(cfg, "TRAIN") is cfg
        assert with_checked_datasets(cfg, "TEST") is cfg
    assert not [x for x in caplog.records if x.name.startswith("d2proposals")]


def test_what_detectron2_drops_itself_is_one_warning(registered, caplog):
    """The file stays as it is: the reader drops these objects, and does not name them."""
    short = [annotation(k, segmentation=[[1, 2, 3, 4]]) for k in (2, 3)]
    dataset = registered([annotation(1, segmentation=[SQUARE]), *short])
    with caplog.at_level(logging.WARNING, "d2proposals"):
        assert checked_dataset(config(dataset), dataset, "TRAIN") == dataset
    messages = [x.message for x in caplog.records if x.name.startswith("d2proposals")]
    assert any("[gt-bad-mask] 2 annotations" in x and "annotation 2 of image 1" in x
               for x in messages)  # fmt: skip
    assert num_objects(DatasetCatalog.get(dataset)) == [1, 0]


def test_mended_copies_have_what_detectron2_would_have(registered):
    """But for the bad annotation, the mended copy is what the reader makes of the good ones."""
    bitmap = np.zeros((HEIGHT, WIDTH), np.uint8)
    bitmap[5:9, 5:9] = 1
    runs = [5 * HEIGHT + 5, 4, HEIGHT - 4, 4, HEIGHT - 4, 4, HEIGHT - 4, 4]
    encoding = {"size": [HEIGHT, WIDTH], "counts": [*runs, HEIGHT * WIDTH - sum(runs)]}
    good = [
        annotation(1, segmentation=[SQUARE], keypoints=[1, 2, 2]),
        annotation(2, iscrowd=1, segmentation=encoding),
        annotation(3, image_id=2, category_id=2, bbox=[1.5, 2, 3, 4]),
        annotation(4, image_id=2, segmentation=[[1, 2]]),
    ]
    clean = registered(good, "clean one")
    spoiled = registered([*good, annotation(5, bbox=[1, 1, "x", 1])], "spoiled one")
    cfg = config(spoiled)
    expected = DatasetCatalog.get(clean)
    got = DatasetCatalog.get(checked_dataset(cfg, spoiled, "TRAIN"))
    keys = ("bbox", "bbox_mode", "iscrowd", "category_id", "keypoints", "segmentation")
    for record, other in zip(got, expected, strict=True):
        for key in ("file_name", "image_id", "height", "width"):
            assert record[key] == other[key]
        ours = [{k: x[k] for k in keys if k in x} for x in record["annotations"]]
        assert ours == [{k: x[k] for k in keys if k in x} for x in other["annotations"]]
    mask = got[0]["annotations"][1]["segmentation"]
    np.testing.assert_array_equal(mask_util.decode(mask), bitmap)
    names = [
        MetadataCatalog.get(x).thing_classes for x in (clean, f"{spoiled}_checked_for_training")
    ]
    assert names == [["cat", "dog"]] * 2


def test_detectors_need_listed_categories(registered):
    dataset = registered([annotation(1), annotation(2, category_id=0)])
    cfg = config(dataset, (), "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match="1 objects of .* have no category that the dataset lists"):
        with_checked_datasets(cfg, "TRAIN")
    assert with_checked_datasets(config(dataset), "TRAIN").DATASETS.TRAIN != (dataset,)


def test_a_file_without_categories_trains_proposals(registered):
    bare = [{k: v for k, v in annotation(n).items() if k != "category_id"} for n in (1, 2)]
    dataset = registered(bare, categories=[])
    name = checked_dataset(config(dataset), dataset, "TRAIN")
    assert [x["category_id"] for x in DatasetCatalog.get(name)[0]["annotations"]] == [0, 0]
    assert MetadataCatalog.get(name).thing_classes == ["object"]


def test_a_list_of_categories_may_be_empty(registered, caplog):
    dataset = registered([annotation(1, category_id=3), annotation(2)], categories=[])
    # As Detectron2 leaves it once it has read the file.
    MetadataCatalog.get(dataset).thing_classes = []
    with caplog.at_level(logging.WARNING):
        name = checked_dataset(config(dataset), dataset, "TRAIN")
    assert [x["category_id"] for x in DatasetCatalog.get(name)[0]["annotations"]] == [0, 0]
    assert MetadataCatalog.get(name).thing_classes == ["object"]
    assert f"{dataset}: its file lists no 'categories'" in caplog.text


def test_images_without_a_file_name_are_one_line(registered):
    record = {"image_id": 7, "height": HEIGHT, "width": WIDTH, "annotations": []}
    record["file_name"] = None
    DatasetCatalog.register("nameless", lambda: [{**record, "file_name": "a.png"}, {**record}])
    with pytest.raises(ValueError, match="1 images of 'nameless' have no 'file_name' .image id 7"):
        Trainer.build_train_loader(config("nameless"))
    with pytest.raises(ValueError, match="1 images of 'nameless' have no 'file_name'"):
        Trainer.build_test_loader(config(None, ("nameless",)), "nameless")
    # Commands that read annotations alone take it.
    assert checked_dataset(config("nameless"), "nameless", "TRAIN") == "nameless"


def test_images_that_a_training_leaves_out_may_be_missing(registered, tmp_path):
    dataset = registered([annotation(1)])
    (tmp_path / "2.png").unlink()
    cfg = config(dataset, (), "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0)
    (item,) = next(iter(Trainer.build_train_loader(cfg)))
    assert item["image_id"] == 1
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with pytest.raises(ValueError, match="1 of 2 images of .* are not there"):
        Trainer.build_train_loader(cfg)


def test_names_of_mended_copies_are_the_configuration_s(registered):
    dataset = registered([annotation(1, iscrowd="0"), annotation(2, image_id=2)])
    for part in ("TRAIN", "TEST"):
        name = checked_dataset(config(dataset), dataset, part)
        assert name != dataset and own_name(name) == dataset
    assert own_name(dataset) == dataset


def test_images_that_are_not_there_are_one_line(registered, tmp_path):
    dataset = registered([annotation(1), annotation(2, image_id=2)])
    path = tmp_path / "2.png"
    path.rename(tmp_path / "away.png")
    line = f"1 of 2 images of '{dataset}' are not there, the first is .*2.png: correct the folder"
    for part in ("TRAIN", "TEST"):
        other = registered([annotation(1)], "all_are_there", file_name="1.png")
        names = (dataset, ()) if part == "TRAIN" else (other, (dataset,))
        with pytest.raises(ValueError, match=line):
            first_batch(config(*names))
        DatasetCatalog.remove("all_are_there")
        MetadataCatalog.remove("all_are_there")
    # Annotations alone can be read.
    assert len(records_to_test(config(dataset), dataset)) == 2
    (tmp_path / "away.png").rename(path)
    assert len(first_batch(config(dataset))) == 2


def test_a_test_set_without_annotations_is_none_without_objects(registered, tmp_path, caplog):
    content = {"images": [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}]}
    content["categories"] = CATEGORIES
    path = tmp_path / "images_alone.json"
    path.write_text(json.dumps(content))
    register_coco_instances("images_alone", {}, str(path), str(tmp_path))
    with caplog.at_level(logging.WARNING):
        name = checked_dataset(config(None, (), "DATASETS.STRICT", True), "images_alone", "TEST")
    assert name == "images_alone" and not caplog.records


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_a_test_set_without_objects_is_named(registered, caplog, iscrowd):
    annotations = [annotation(1, iscrowd=1)] if iscrowd else []
    dataset = registered(annotations)
    with caplog.at_level(logging.WARNING):
        checked_dataset(config(None, (dataset,)), dataset, "TEST")
    (message,) = [x.message for x in caplog.records if "[gt-no-objects]" in x.message]
    assert ("1 annotations are crowd regions" in message) == iscrowd
    with pytest.raises(ValueError, match="DATASETS.STRICT.*no objects to find"):
        checked_dataset(config(None, (dataset,), "DATASETS.STRICT", True), dataset, "TEST")


@pytest.mark.parametrize("has_function", [False, True])
def test_annotations_without_any_category_are_of_one(registered, caplog, has_function):
    """Of a file that lists categories, and of a function."""
    bare = [{k: v for k, v in annotation(n).items() if k != "category_id"} for n in (1, 2)]
    dataset = registered(bare)
    if has_function:
        dataset = "without categories"
        items = [{"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS} for _ in range(2)]
        record = {"file_name": "1.png", "height": HEIGHT, "width": WIDTH, "annotations": items}
        DatasetCatalog.register(dataset, lambda: [record])
    with caplog.at_level(logging.WARNING):
        name = checked_dataset(config(dataset), dataset, "TRAIN")
    assert [x["category_id"] for x in DatasetCatalog.get(name)[0]["annotations"]] == [0, 0]
    assert MetadataCatalog.get(name).thing_classes == ["object"]
    assert f"{dataset}: no annotation has a 'category_id'" in caplog.text
    detector = config(dataset, (), "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    with pytest.raises(ValueError, match="2 objects of .* have no category"):
        checked_dataset(detector, dataset, "TRAIN")


def test_test_sets_are_checked_before_training(registered):
    train = registered([annotation(1)], "train of a job")
    test = registered([annotation(1), annotation(1, image_id=2)], "test of a job")
    with pytest.raises(ValueError, match=r"DATASETS.STRICT, and .*'test of a job': \[gt-same-id\]"):
        Trainer.build_train_loader(config(train, (test,), "DATASETS.STRICT", True))
    cfg = config(train, (test,))
    loader = Trainer.build_test_loader(cfg, test)
    assert [item[0]["image_id"] for item in loader] == [1, 2]


def test_detections_are_measured_on_the_mended_copy(registered, tmp_path):
    bad = annotation(2, image_id=2, bbox=[1, 1, 5, -5])
    dataset = registered([annotation(1), annotation(4, image_id=2, iscrowd="0"), bad])
    cfg = config(None, (dataset,), "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    evaluator = Trainer.build_evaluator(cfg, dataset, str(tmp_path))._evaluators[0]
    loaded = evaluator._coco_api.dataset["annotations"]
    assert [(x["image_id"], x["iscrowd"], x["bbox"]) for x in loaded] == [(1, 0, BOX), (2, 0, BOX)]


def test_own_functions(registered):
    """Records of a function: without image ids in training, with boxes that are wrong."""

    def records():
        item = {"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        bad = {**item, "bbox": [9, 9, 2, 2], "bbox_mode": BoxMode.XYXY_ABS}
        return [{"file_name": "a.png", "height": 64, "width": 80, "annotations": [item, bad]}]

    DatasetCatalog.register("an own function", records)
    name = checked_dataset(config("an own function"), "an own function", "TRAIN")
    assert num_objects(DatasetCatalog.get(name)) == [1]


def test_another_dataset_of_the_same_name_is_checked_anew(registered):
    def register(box):
        item = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        record = {"image_id": 1, "file_name": "1.png", "annotations": [item]}
        DatasetCatalog.register("made twice", lambda: [record])

    register([1, 1, -5, 5])
    assert checked_dataset(config("made twice"), "made twice", "TRAIN") != "made twice"
    DatasetCatalog.remove("made twice")
    register(BOX)
    assert checked_dataset(config("made twice"), "made twice", "TRAIN") == "made twice"
    DatasetCatalog.remove("made twice")
    register([1, 1, 5, -5])
    name = checked_dataset(config("made twice"), "made twice", "TRAIN")
    assert num_objects(DatasetCatalog.get(name)) == [0]


def test_a_dataset_that_is_there_twice_stays_so(registered):
    cfg = config(registered([annotation(1), annotation(1, image_id=2)]))
    cfg.DATASETS.TRAIN *= 2
    (first, second) = with_checked_datasets(cfg, "TRAIN").DATASETS.TRAIN
    assert first == second != cfg.DATASETS.TRAIN[0]


def test_commands_read_what_a_test_reads(registered):
    """Where Detectron2's reader stops at an annotation."""
    name = registered([annotation(1), annotation(1, image_id=2)])
    with pytest.raises(AssertionError):
        DatasetCatalog.get(name)
    records = records_to_test(config("", (name,)), name)
    assert [record["image_id"] for record in records] == [1, 2]


def test_sampling_weights_follow_the_copies(registered):
    dataset = registered([annotation(1), annotation(1, image_id=2)])
    cfg = config(dataset)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(dataset, 2.0)]
    checked = with_checked_datasets(cfg, "TRAIN").DATASETS
    assert checked.TRAIN_REPEAT_FACTOR == [(checked.TRAIN[0], 2.0)] and cfg.DATASETS.TRAIN == (
        dataset,
    )


def test_a_dataset_without_images_is_one_line(registered):
    DatasetCatalog.register("without images", list)
    with pytest.raises(ValueError, match="'without images' has no images to test on"):
        Trainer.build_test_loader(config(None, ("without images",)), "without images")


def test_unlisted_categories_are_tested_as_one_more(registered):
    dataset = registered([annotation(1), annotation(2, category_id=9), annotation(3, image_id=2)])
    cfg = config(None, (dataset,))
    assert len(Trainer.build_test_loader(cfg, dataset)) == 2
    items = records_to_test(cfg, dataset)[0]["annotations"]
    assert [item["category_id"] for item in items] == [0, 2]
    classes = MetadataCatalog.get(checked_dataset(cfg, dataset, "TEST")).thing_classes
    assert classes == ["cat", "dog", "unlisted"]
