"""PASCAL VOC's AP by class: worked by hand, and against Detectron2's on XML files."""

import json
import logging
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_coco_json,
    load_voc_instances,
    register_coco_instances,
    register_pascal_voc,
)
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.structures import Boxes, BoxMode, Instances

from d2proposals.data.dataset_reading import read_dataset
from d2proposals.evaluation.voc_average_precision import Detections, Objects, average_precisions
from d2proposals.evaluation.voc_evaluator import VOCEvaluator, objects_of

NAMES = ["cat", "dog", "sheep"]


def make_objects(*objects):
    """Objects from (x1, y1, x2, y2, category, difficult)."""
    table = np.array(objects, np.float64).reshape(-1, 6)
    return Objects(table[:, :4], table[:, 4].astype(np.int64), table[:, 5] > 0)


def make_detections(*detections):
    """Detections from (x1, y1, x2, y2, category, score)."""
    table = np.array(detections, np.float64).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 5], table[:, 4].astype(np.int64))


def instances_of(detections: Detections) -> Instances:
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.as_tensor(detections.boxes, dtype=torch.float32))
    instances.scores = torch.as_tensor(detections.scores, dtype=torch.float32)
    instances.pred_classes = torch.as_tensor(detections.categories)
    return instances


def ap50(objects, detections, eleven_points=True):
    return average_precisions(objects, detections, 3, eleven_points=eleven_points)[:, 0]


@pytest.mark.parametrize("eleven_points, expected", [(True, (6 + 5 * 2 / 3) / 11), (False, 5 / 6)])
def test_curve_worked_by_hand(eleven_points, expected):
    """Right, wrong, right of two objects: precisions 1, 1/2, 2/3 at recalls 1/2, 1/2, 1.

    Recalls 0 to .5 are six of the eleven points; the area is 1/2 + 1/2 * 2/3.
    """
    objects = [make_objects((0, 0, 10, 10, 1, 0)), make_objects((20, 0, 30, 10, 1, 0))]
    detections = [
        make_detections((60, 60, 70, 70, 1, 0.8), (0, 0, 10, 10, 1, 0.9)),
        make_detections((20, 0, 30, 10, 1, 0.7)),
    ]
    result = ap50(objects, detections, eleven_points)
    assert result[1] == pytest.approx(expected)
    assert np.isnan(result[[0, 2]]).all()  # classes without objects


@pytest.mark.parametrize(
    "detections, expected",
    [
        # One hit after the other on the difficult object: neither right nor wrong.
        ([(0, 0, 10, 10, 0, 0.9), (0, 0, 10, 9, 0, 0.8), (50, 0, 60, 10, 0, 0.7)], 1),
        # Twice on the plain object: the second is wrong, but stands behind all that is right.
        ([(50, 0, 60, 10, 0, 0.9), (50, 0, 60, 9, 0, 0.8)], 1),
        # A wrong one (on an object of another class) before the right one.
        ([(80, 80, 90, 90, 0, 0.9), (50, 0, 60, 10, 0, 0.8)], 1 / 2),
        # The better place, not the better score, decides nothing: the first of an object counts.
        ([(50, 0, 60, 8, 0, 0.9), (50, 0, 60, 10, 0, 0.8)], 1),
        # IoU .5 itself is not above it.
        ([(50, 0, 60, 5, 0, 0.9)], 0),
        # Another class on the same place.
        ([(50, 0, 60, 10, 1, 0.9)], 0),
        # Boxes that are no boxes.
        (
            [(50, 0, np.inf, 10, 0, 0.9), (55, 5, 55, 5, 0, 0.9), (np.nan, 0, 60, 10, 0, 0.9),
             (50, 0, 60, 10, 0, 0.8)],
            1 / 4,
        ),
        ([], 0),
    ],
)  # fmt: skip
def test_rules_worked_by_hand(detections, expected):
    """Class 0 has a difficult object and a plain one, class 1 a plain one."""
    objects = [make_objects((0, 0, 10, 10, 0, 1), (50, 0, 60, 10, 0, 0), (80, 80, 90, 90, 1, 0))]
    for eleven_points in (True, False):
        result = ap50(objects, [make_detections(*detections)], eleven_points)
        assert result[0] == pytest.approx(expected)


def test_a_detection_belongs_to_the_object_that_it_overlaps_most_even_a_difficult_one():
    objects = [make_objects((0, 0, 10, 10, 0, 1), (0, 0, 10, 8, 0, 0))]
    on_the_difficult = make_detections((0, 0, 10, 9.9, 0, 0.9))
    assert ap50(objects, [on_the_difficult])[0] == 0
    assert ap50(objects, [make_detections((0, 0, 10, 8.1, 0, 0.9))])[0] == pytest.approx(1)


def test_no_images_and_no_objects():
    assert np.isnan(ap50([], [])).all()
    assert np.isnan(ap50([make_objects()], [make_detections((0, 0, 1, 1, 0, 0.5))])).all()


def random_case(seed, num_images=12):
    """Integer objects and detections around them, with scores of which no two are equal."""
    rng = np.random.default_rng(seed)
    objects, detections = {}, {}
    scores = iter(rng.permutation(999) / 1000)
    for image in range(num_images):
        num = rng.integers(0, 5)
        corners = rng.integers(0, 60, (num, 2))
        boxes = np.concatenate([corners, corners + rng.integers(5, 35, (num, 2))], axis=1)
        extra = np.stack([rng.integers(0, 3, num), rng.random(num) < 0.3], axis=1)
        objects[f"{image:06d}"] = make_objects(*np.concatenate([boxes, extra], axis=1))
        near = boxes.repeat(3, axis=0) + rng.normal(0, 3, (3 * num, 4)).round(1)
        far = rng.random((4, 4)).round(1) * 40 + [0, 0, 41, 41]
        rows = np.concatenate([near, far])
        kinds = np.concatenate([extra[:, 0].repeat(3), rng.integers(0, 3, 4)])
        table = np.column_stack([rows, kinds, [next(scores) for _ in rows]])
        detections[f"{image:06d}"] = make_detections(*table)
    return objects, detections


def write_voc(folder, objects):
    """PASCAL VOC's files: pixels counted from 1, the last ones belong to the object."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(objects) + "\n")
    for image_id, of_image in objects.items():
        items = ""
        for box, kind, hard in zip(
            of_image.boxes, of_image.categories, of_image.is_difficult, strict=True
        ):
            x1, y1, x2, y2 = box.astype(int)
            items += (
                f"<object><name>{NAMES[kind]}</name><pose>-</pose><truncated>0</truncated>"
                f"<difficult>{int(hard)}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            )
        size = "<size><width>100</width><height>100</height><depth>3</depth></size>"
        path = folder / "Annotations" / f"{image_id}.xml"
        path.write_text(f"<annotation>{size}{items}</annotation>")


@pytest.fixture
def forget_datasets():
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run(evaluator, detections):
    evaluator.reset()
    for image_id, of_image in detections.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances_of(of_image)}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize("year", [2007, 2012])
def test_same_as_detectron2_on_xml_files(year, tmp_path, forget_datasets):
    objects, detections = random_case(seed=year)
    write_voc(tmp_path, objects)
    register_pascal_voc("voc_twin", str(tmp_path), "test", year, NAMES)
    theirs_evaluator = PascalVOCDetectionEvaluator("voc_twin")
    theirs = run(theirs_evaluator, detections)
    ours = run(VOCEvaluator("voc_twin"), detections)
    assert 5 < ours["AP"] < ours["AP50"] < 95
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    for kind, name in enumerate(NAMES):
        lines = theirs_evaluator._predictions[kind]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        _, _, expected = voc_eval(
            str(tmp_path / "{}.txt"), str(tmp_path / "Annotations" / "{}.xml"),
            str(tmp_path / "ImageSets" / "Main" / "test.txt"), name, 0.5, year == 2007,
        )  # fmt: skip
        assert ours[f"AP50-{name}"] == pytest.approx(100 * expected, abs=1e-6)


def write_json(path, objects):
    annotations = [
        {"image_id": int(image_id), "category_id": 10 * int(kind + 1), "area": 1.0, "iscrowd": 0,
         "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()], "difficult": int(hard)}
        for image_id, o in objects.items()
        for box, kind, hard in zip(o.boxes, o.categories, o.is_difficult, strict=True)
    ]  # fmt: skip
    content = {
        "images": [
            {"id": int(i), "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in objects
        ],
        "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)],
    }
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("how", ["coco", "records"])
def test_a_coco_style_file_gives_what_xml_files_give(how, tmp_path, forget_datasets, caplog):
    objects, detections = random_case(seed=3)
    write_voc(tmp_path, objects)
    register_pascal_voc("voc_of_xml", str(tmp_path), "test", 2007, NAMES)
    path = str(tmp_path / "test.json")
    write_json(tmp_path / "test.json", objects)
    if how == "coco":
        register_coco_instances("voc_of_json", {"year": 2007}, path, "images")
    else:
        load = partial(load_coco_json, path, "images", "voc_of_json", ["difficult"])
        DatasetCatalog.register("voc_of_json", load)
        MetadataCatalog.get("voc_of_json").set(year=2007)
    of_json = {str(int(image_id)): d for image_id, d in detections.items()}
    with caplog.at_level(logging.INFO, "d2proposals"):
        results = run(VOCEvaluator("voc_of_json"), of_json)
    assert results == pytest.approx(run(VOCEvaluator("voc_of_xml"), detections))
    table = caplog.messages[-1]
    for name in NAMES:
        assert f"{name} " in table and f"{results[f'AP50-{name}']:.2f}" in table
    assert "eleven points" in table


# Each beside the only plain object.
NEITHER_RIGHT_NOR_WRONG = {
    "difficult": {"difficult": 1},
    "ignore": {"ignore": 1},
    "true as text": {"difficult": "1"},
    "unlisted category": {"category_id": 99},
}


@pytest.mark.parametrize("kind", NEITHER_RIGHT_NOR_WRONG)
def test_a_file_that_detectron2_cannot_read_is_measured_as_it_was_mended(
    kind, tmp_path, forget_datasets
):
    """The other object is found first: that is wrong only where it is none of the class."""
    objects = {"000001": make_objects((0, 0, 10, 10, 0, 0), (50, 0, 60, 10, 0, 0))}
    path = tmp_path / "test.json"
    write_json(path, objects)
    content = json.loads(path.read_text())
    plain, other = content["annotations"]
    plain.update(iscrowd="0", difficult="0")
    del other["difficult"]
    other.update(id=1, **NEITHER_RIGHT_NOR_WRONG[kind])
    path.write_text(json.dumps(content))
    register_coco_instances("voc_mended", {"year": 2007}, str(path), "images")
    found = make_detections((50, 0, 60, 10, 0, 0.9), (0, 0, 10, 10, 0, 0.8))
    expected = 50 if kind == "unlisted category" else 100
    assert run(VOCEvaluator("voc_mended"), {"1": found})["AP50"] == pytest.approx(expected)


@pytest.mark.parametrize("how", ["coco", "xml"])
def test_a_function_that_takes_some_images_is_measured_on_these(how, tmp_path, forget_datasets):
    objects, detections = random_case(seed=5)
    first = dict(list(objects.items())[:6])
    if how == "coco":
        path = tmp_path / "test.json"
        write_json(path, objects)
        load = partial(load_coco_json, str(path), "images", "voc_some")
        metadata = {"json_file": str(path)}
        detections = {str(int(image_id)): d for image_id, d in detections.items()}
    else:
        write_voc(tmp_path, objects)
        load = partial(load_voc_instances, str(tmp_path), "test", NAMES)
        metadata = {"dirname": str(tmp_path), "split": "test", "thing_classes": NAMES}
    DatasetCatalog.register("voc_some", lambda: load()[:6])
    MetadataCatalog.get("voc_some").set(year=2007, **metadata)
    write_voc(tmp_path / "first", first)
    register_pascal_voc("voc_first", str(tmp_path / "first"), "test", 2007, NAMES)
    of_first = {f"{int(image_id):06d}": d for image_id, d in detections.items()}
    expected = run(VOCEvaluator("voc_first"), of_first)
    assert run(VOCEvaluator("voc_some"), detections) == pytest.approx(expected)


def test_a_function_that_numbers_classes_anew_is_measured_by_its_own(tmp_path, forget_datasets):
    """Cats and dogs are one class to it, sheep the other."""
    objects, detections = random_case(seed=6)
    path = tmp_path / "test.json"
    write_json(path, objects)
    records = load_coco_json(str(path), "images", "voc_in_three", ["difficult"])
    for item in [item for record in records for item in record["annotations"]]:
        item["category_id"] = int(item["category_id"] == 2)
    DatasetCatalog.register("voc_in_two", lambda: records)
    metadata = {"json_file": str(path), "thing_classes": ["pet", "sheep"], "year": 2007}
    MetadataCatalog.get("voc_in_two").set(**metadata)
    of_json = {
        str(int(image_id)): Detections(d.boxes, d.scores, (d.categories == 2).astype(np.int64))
        for image_id, d in detections.items()
    }
    results = run(VOCEvaluator("voc_in_two"), of_json)
    expected = average_precisions(
        [Objects(o.boxes, (o.categories == 2).astype(np.int64), o.is_difficult)
         for o in objects.values()],
        list(of_json.values()), 2, eleven_points=True,
    )  # fmt: skip
    assert results["AP50-pet"] == pytest.approx(100 * expected[0, 0])
    assert results["AP50-sheep"] == pytest.approx(100 * expected[1, 0])


def test_perfect_detections_of_dog_and_cat(tmp_path, forget_datasets):
    """The classes have 100 each by name, and no class that has no objects pulls the mean down."""
    objects = {"000001": make_objects((0, 0, 49, 19, 0, 0), (10, 20, 30, 40, 1, 0)),
               "000002": make_objects((5, 5, 20, 20, 2, 1))}  # fmt: skip
    write_voc(tmp_path, objects)
    register_pascal_voc("voc_oracle", str(tmp_path), "test", 2007, NAMES)
    evaluator = VOCEvaluator("voc_oracle")
    oracle = {"000001": make_detections((0, 0, 49, 19, 0, 0.9), (10, 20, 30, 40, 1, 0.8))}
    results = run(evaluator, oracle)
    assert results == pytest.approx(
        {"AP": 100, "AP50": 100, "AP75": 100, "AP50-cat": 100, "AP50-dog": 100}
    )
    assert all(type(value) is float for value in results.values())
    # A second evaluation of the same object starts anew.
    assert run(evaluator, {})["AP50"] == 0


@pytest.mark.parametrize(("year", "expected"), [(2009, 600 / 11), (2010, 50)])
def test_the_year_decides_how_precision_is_averaged(year, expected, register_dataset):
    annotation = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    boxes = [[0, 0, 10, 10], [50, 50, 10, 10]]
    annotations = [{**annotation, "bbox": box} for box in boxes]
    name = register_dataset([{"image_id": 1, "annotations": annotations}], thing_classes=NAMES)
    MetadataCatalog.get(name).set(year=year)
    # One of two objects: a precision of 1 at the recalls 0, .1 ... .5, or over half of the axis.
    found = {"1": make_detections((0, 0, 10, 10, 0, 0.9))}
    assert run(VOCEvaluator(name), found)["AP50"] == pytest.approx(expected)


def test_crowds_are_ignored_and_a_year_is_needed(register_dataset):
    annotation = {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = [{"image_id": 1, "annotations": [{**annotation, "iscrowd": 1}]}, {"image_id": 2}]
    name = register_dataset(records, thing_classes=NAMES)
    objects = objects_of(read_dataset(name))
    assert objects["1"].is_difficult.tolist() == [True] and len(objects["2"].boxes) == 0
    with pytest.raises(ValueError, match="set it with MetadataCatalog.get.*set.year=2007."):
        VOCEvaluator(name)
    MetadataCatalog.get(name).set(year=2007)
    evaluator = VOCEvaluator(name)
    assert run(evaluator, {"1": make_detections((0, 0, 10, 10, 0, 0.9))}) == {}
