"""Tests of what is found out about datasets before a job starts."""

from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2proposals.engine import check_evaluations
from d2proposals.engine.training_records import training_records
from tests.common import forgotten_datasets, make_cfg

SQUARE = [[0, 0, 9, 0, 9, 9, 0, 9]]


@pytest.fixture
def register():
    """Registers datasets of one image, by name, and forgets them."""

    def _register(name, annotations, classes=(), with_id=True, **metadata):
        record = {"file_name": f"{name}.png", "height": 50, "width": 50}
        record.update({"image_id": 1} if with_id else {}, annotations=annotations)
        DatasetCatalog.register(name, lambda: [record])
        if classes:
            metadata["thing_classes"] = list(classes)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    with forgotten_datasets() as names:
        yield _register


def item(category=0, **more):
    return {
        "bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **more
    }  # fmt: skip


def train_cfg(name, *overrides, config="shapes/rpn_only.yaml"):
    return make_cfg(config, "DATASETS.TRAIN", (name,), *overrides)


def test_more_classes_than_the_heads_have(register):
    name = register("records_classes", [item(0), item(3)], "abcd")
    assert len(training_records(train_cfg(name))) == 1  # boxes alone
    overrides = ("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    cfg = train_cfg(name, *overrides, config="shapes/faster_rcnn_rpn.yaml")
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 3.*has 4 classes \(a, b, c, d\).*to 4"):
        training_records(cfg)
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    assert len(training_records(cfg)) == 1
    cfg = train_cfg(name, *overrides, "MODEL.DETECTORNET.CLASS_AGNOSTIC", False,
                    config="shapes/detectornet_rpn_only.yaml")  # fmt: skip
    with pytest.raises(ValueError, match="NUM_CLASSES is 3"):
        training_records(cfg)


def test_datasets_of_different_classes_need_a_model_that_tells_none_apart(register):
    names = tuple(register(f"records_of_{word}", [item()], [word]) for word in ("cat", "dog"))
    train = ("DATASETS.TRAIN", names)
    assert len(training_records(make_cfg("shapes/rpn_only.yaml", *train))) == 2
    with pytest.raises(ValueError, match="records_of_dog.* different classes, which MODEL.ROI_HE"):
        training_records(make_cfg("shapes/faster_rcnn_rpn.yaml", *train))


@pytest.mark.parametrize("annotations", [[], [item(iscrowd=1)]])
def test_nothing_to_train_on(register, annotations):
    name = register("records_nothing", annotations)
    with pytest.raises(ValueError, match="records_nothing: no image has an object to train on"):
        training_records(train_cfg(name))
    cfg = train_cfg(name, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    assert len(training_records(cfg)) == 1
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        training_records(make_cfg("shapes/rpn_only.yaml", "DATASETS.TRAIN", ()))


def test_masks_that_are_asked_for_and_not_there(register):
    masked = item(segmentation=SQUARE)
    some = register("records_some", [masked, item(), item(segmentation=[])])
    encoded = register("records_encoded", [masked, item(segmentation={"size": [50, 50]})])
    masks = ("INPUT.USE_INSTANCE_MASK", True)
    assert training_records(train_cfg(some))
    with pytest.raises(ValueError, match="2 of 3 annotations of records_some have no mask.*png"):
        training_records(train_cfg(some, *masks))
    with pytest.raises(ValueError, match="1 masks of records_encoded are run-length encoded"):
        training_records(train_cfg(encoded, *masks, "INPUT.MASK_FORMAT", "polygon"))
    assert training_records(train_cfg(encoded, *masks, "INPUT.MASK_FORMAT", "bitmask"))


def test_evaluations_that_would_fail_after_the_training(register):
    unnamed = register("records_unnamed", [item()], with_id=False)
    typeless = register("records_typeless", [item()])
    coco = register("records_coco", [item()], "ab", evaluator_type="coco")

    def cfg_of(name, config, *overrides):
        return make_cfg(config, "DATASETS.TEST", (name,), *overrides)

    detector, proposals = "shapes/faster_rcnn_rpn.yaml", "shapes/rpn_only.yaml"
    with pytest.raises(ValueError, match="1 of 1 images of DATASETS.TEST 'records_unnamed' have"):
        check_evaluations(cfg_of(unnamed, proposals))
    check_evaluations(cfg_of(typeless, proposals))
    with pytest.raises(ValueError, match="'records_typeless' has evaluator_type 'None'"):
        check_evaluations(cfg_of(typeless, detector))
    check_evaluations(cfg_of(coco, proposals))
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 16.*has 2 classes \(a, b\): set it to 2"):
        check_evaluations(cfg_of(coco, detector))
    check_evaluations(cfg_of(coco, detector, "MODEL.ROI_HEADS.NUM_CLASSES", 2))
    limits = ("TEST.PROPOSALS.LIMITS", (1, 5000))
    seen = ("TEST.PROPOSALS.SEEN", ("dog",))
    for config in (detector, proposals):
        of_two = cfg_of(coco, config, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *limits)
        with pytest.raises(ValueError, match=r"TEST.PROPOSALS.LIMITS.*not \(1, 5000\)"):
            check_evaluations(of_two)
        of_two = cfg_of(coco, config, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *seen)
        with pytest.raises(ValueError, match="TEST.PROPOSALS.SEEN, of 'records_coco': .*dog"):
            check_evaluations(of_two)
        # Of difficult objects that do not count, none is left that is unseen.
        objects = [item(0), item(1, difficult=True)]
        hard = register(f"records_hard_{Path(config).stem}", objects, "ab", evaluator_type="coco")
        of_a = ("MODEL.ROI_HEADS.NUM_CLASSES", 2, "TEST.PROPOSALS.SEEN", ("a",))
        check_evaluations(cfg_of(hard, config, *of_a))
        with pytest.raises(ValueError, match="TEST.PROPOSALS.SEEN, of 'records_hard"):
            check_evaluations(cfg_of(hard, config, *of_a, "TEST.PROPOSALS.COUNT_DIFFICULT", False))
        # Where nobody measures proposals, nobody reads these.
        if config == detector:
            of_two = cfg_of(
                coco, config, "MODEL.ROI_HEADS.NUM_CLASSES", 2, *limits, *seen,
                "TEST.PROPOSALS.OF_DETECTORS", False,
            )  # fmt: skip
            check_evaluations(of_two)


@pytest.mark.parametrize(
    ("expected", "number", "line"),
    [
        ([["box_proposals", "AR@100", 44.0, 0.5]], 1, None),
        ([["bbox", "AP", 44.0, 0.5]], 1, None),
        ([["box_proposals", "AR@100", 44.0, 0.5]], 2, "DATASETS.TEST has 2: name one"),
        ([["box_proposals", "AR@100", 44.0]], 1, r"got \['box_proposals', 'AR@100', 44.0\]"),
        ([["boxes", "AR@100", 44.0, 0.5]], 1, "tasks that begin with box_proposals"),
        (["bbox"], 1, "got 'bbox'"),
    ],
)
def test_expected_results_are_checked_before_the_work(register, expected, number, line):
    names = [register(f"records_expected_{k}", [item()]) for k in range(number)]
    overrides = ("DATASETS.TEST", tuple(names), "TEST.EXPECTED_RESULTS", expected)
    cfg = make_cfg("shapes/rpn_only.yaml", *overrides)
    if line is None:
        check_evaluations(cfg)
        return
    with pytest.raises(ValueError, match=f"^TEST.EXPECTED_RESULTS .*{line}"):
        check_evaluations(cfg)


@pytest.mark.parametrize("evaluator_type", ["coco", "pascal_voc"])
def test_detectors_tested_on_classes_of_another_order(register, caplog, evaluator_type):
    kinds = {"evaluator_type": evaluator_type}
    trained = register("records_abc", [item()], "abc")
    same = register("records_abcd", [item()], "abcd", **kinds)
    moved = register("records_acb", [item()], "acb", **kinds)
    others = register("records_axc", [item()], "axc", **kinds)
    # A class that moved among others: another dataset, of which its proposals may be measured.
    another = register("records_axbc", [item()], "axbc", **kinds)

    def cfg_of(test, config="shapes/faster_rcnn_rpn.yaml"):
        return make_cfg(
            config, "DATASETS.TRAIN", (trained,), "DATASETS.TEST", (test,),
            "MODEL.ROI_HEADS.NUM_CLASSES", 3,
        )  # fmt: skip

    def words():
        found = [
            x.getMessage() for x in caplog.records if "counted by the number" in x.getMessage()
        ]
        caplog.clear()
        return found

    check_evaluations(cfg_of(same))
    assert not words()
    with pytest.raises(ValueError, match="class 1 is 'b' in DATASETS.TRAIN 'records_abc' and 'c'"):
        check_evaluations(cfg_of(moved))
    check_evaluations(cfg_of(moved), trains=False)
    assert "(2 of 3 classes differ)" in words()[0]
    # One of another name may be the same.
    check_evaluations(cfg_of(others))
    assert "class 1 is 'b'" in words()[0]
    check_evaluations(cfg_of(another))
    assert "(2 of 4 classes differ)" in words()[0]
    check_evaluations(cfg_of(moved, "shapes/rpn_only.yaml"))
    assert not words()
