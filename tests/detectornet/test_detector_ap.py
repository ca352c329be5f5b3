"""AP of each class on PASCAL VOC (Table 1): from perfect masks to figures by name."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from d2proposals.engine import Trainer
from tests.common import make_cfg
from tests.detectornet.test_generator import PerfectNetwork

NAMES = ["cat", "dog", "sheep"]
# Class and box of each object of two images of 240 x 320.
IMAGES = [[(1, [40, 50, 150, 170])], [(0, [60, 30, 260, 200]), (1, [20, 150, 90, 230])]]


@pytest.fixture
def dataset():
    records = [
        {"image_id": index, "file_name": "", "height": 240, "width": 320, "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": class_id}
            for class_id, box in objects
        ]}
        for index, objects in enumerate(IMAGES)
    ]  # fmt: skip
    DatasetCatalog.register("voc_oracle", lambda: records)
    MetadataCatalog.get("voc_oracle").set(
        thing_classes=NAMES, year=2007, evaluator_type="pascal_voc"
    )
    yield "voc_oracle"
    DatasetCatalog.remove("voc_oracle")
    MetadataCatalog.remove("voc_oracle")


def test_perfect_masks_of_dog_and_cat(dataset):
    cfg = make_cfg(
        "detectornet_voc.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 3,
        "MODEL.DETECTORNET.CLASSIFIER.ENABLED", False, "MODEL.DETECTORNET.WIDTH_FACTOR", 0.01,
    )  # fmt: skip
    model = build_model(cfg).eval()
    evaluator = Trainer.build_evaluator(cfg, dataset)
    assert isinstance(evaluator, DatasetEvaluators)
    evaluator.reset()
    for index, objects in enumerate(IMAGES):
        classes, boxes = zip(*objects, strict=True)
        model.proposal_generator._regress = PerfectNetwork(
            list(boxes), classes=list(classes), num_classes=3
        )
        inputs = [
            {"image": torch.zeros(3, 240, 320), "image_id": index, "height": 240, "width": 320}
        ]
        with torch.no_grad():
            evaluator.process(inputs, model(inputs))
    results = evaluator.evaluate()["bbox"]
    # No sheep are there, and their mean is of the others.
    assert {k: v for k, v in results.items() if k.startswith("AP50")} == pytest.approx(
        {"AP50": 100, "AP50-cat": 100, "AP50-dog": 100}
    )
