"""Tests of training on some of a dataset's categories."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, build
from detectron2.structures import BoxMode

from d2proposals.data.category_choice import with_chosen_categories
from d2proposals.engine.training_records import training_records, with_training_copies
from d2proposals.files.annotation_file import VOC_CATEGORIES
from tests.common import forgotten_datasets, make_cfg

CLASSES = ("cat", "dog", "zebra", "car")


def item(category, **more):
    return {
        "bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **more
    }  # fmt: skip


@pytest.fixture
def animals():
    """Images of a zebra and a cat, of a zebra, of crowds of both, and of nothing."""
    objects = [[item(2), item(0)], [item(2)], [item(0, iscrowd=1), item(2, iscrowd=1)], []]
    records = [
        {"file_name": f"{k}.png", "image_id": k, "height": 50, "width": 50, "annotations": items}
        for k, items in enumerate(objects)
    ]
    with forgotten_datasets() as names:
        before = set(DatasetCatalog.list())
        DatasetCatalog.register("animals", lambda: records)
        MetadataCatalog.get("animals").set(thing_classes=list(CLASSES), json_file="of_all.json")
        yield "animals"
        names += set(DatasetCatalog.list()) - before


def chosen_records(cfg):
    return training_records(with_training_copies(cfg))


def categories_of(records):
    return [[x["category_id"] for x in record.get("annotations", [])] for record in records]


@pytest.mark.parametrize("chosen", [("cat", "dog"), ("0", "1"), [0, 1]])
def test_objects_of_other_categories_are_gone(animals, chosen):
    copy = with_chosen_categories(animals, chosen)
    records = DatasetCatalog.get(copy)
    # All images are there; crowd of other categories is gone, too; numbers stay.
    assert categories_of(records) == [[0], [], [0], []]
    metadata = MetadataCatalog.get(copy)
    assert tuple(metadata.thing_classes) == CLASSES
    # Evaluators and checks would read all objects from it.
    assert metadata.get("json_file") is None
    assert categories_of(DatasetCatalog.get(animals))[0] == [2, 0]
    # Again, and of others, beside it.
    assert with_chosen_categories(animals, chosen) == copy
    assert with_chosen_categories(animals, ["zebra"]) != copy


@pytest.mark.parametrize(
    ("chosen", "line"),
    [
        (("horse",), r"DATASETS.CATEGORIES, of 'animals': the dataset has no category 'horse'"),
        (("voc",), r"DATASETS.CATEGORIES, of 'animals': 'voc' needs COCO's categories"),
        (("4",), r"DATASETS.CATEGORIES, of 'animals': the dataset has no category '4'"),
    ],
)
def test_unknown_categories_are_one_line(animals, chosen, line):
    cfg = make_cfg("shapes/rpn_only.yaml", "DATASETS.TRAIN", (animals,))
    cfg.DATASETS.CATEGORIES = chosen
    with pytest.raises(ValueError, match=line) as error:
        chosen_records(cfg)
    assert "\n" not in str(error.value)


def test_images_without_an_object_left(animals):
    cfg = make_cfg("shapes/rpn_only.yaml", "DATASETS.TRAIN", (animals,))
    assert len(chosen_records(cfg)) == 2
    cfg.DATASETS.CATEGORIES = ("cat",)
    assert [x["image_id"] for x in chosen_records(cfg)] == [0]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert categories_of(chosen_records(cfg)) == [[0], [], [0], []]
    cfg.DATASETS.CATEGORIES = ("car",)
    assert len(chosen_records(cfg)) == 4
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    with pytest.raises(ValueError, match="animals of car: no image has an object to train on"):
        chosen_records(cfg)


def test_weights_of_the_sampler_are_those_of_the_images_left(animals):
    cfg = make_cfg("shapes/rpn_only.yaml", "DATASETS.TRAIN", (animals,))
    cfg.DATASETS.CATEGORIES = ("cat",)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(animals, 2.0)]
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.NUM_WORKERS = "WeightedTrainingSampler", 0
    # Which Detectron2 makes from the datasets of the configuration, not from the records.
    copies = with_training_copies(cfg)
    assert build._build_weighted_sampler(copies)._int_part.tolist() == [2.0]
    assert len(training_records(copies)) == 1


def test_voc_s_are_twenty_of_coco_s():
    names = sorted({*VOC_CATEGORIES, "zebra", "kite"})
    records = [{"file_name": "a", "annotations": [item(k) for k in range(len(names))]}]
    records.append({"file_name": "not annotated"})
    with forgotten_datasets() as forgotten:
        DatasetCatalog.register("of_coco", lambda: records)
        MetadataCatalog.get("of_coco").set(thing_classes=names)
        copy = with_chosen_categories("of_coco", ["voc"])
        forgotten += ["of_coco", copy]
        kept, _ = categories_of(DatasetCatalog.get(copy))
        assert DatasetCatalog.get(copy)[1] == records[1]
    assert len(kept) == 20 and {names[k] for k in kept} == set(VOC_CATEGORIES)


def test_a_dataset_that_is_no_list():
    with forgotten_datasets() as names:
        DatasetCatalog.register("a_map", dict)
        MetadataCatalog.get("a_map")
        names.append("a_map")
        with pytest.raises(ValueError, match="'a_map' as a list, and its function returns a dict"):
            with_chosen_categories("a_map", ["cat"])
