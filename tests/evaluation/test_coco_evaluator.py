"""Tests of COCO's average precision on a dataset with some images of its file."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from d2proposals.evaluation.coco_evaluator import SubsetCOCOEvaluator
from tests.common import forgotten_datasets
from tests.engine.tiny_coco import registered, write_tiny_coco


def found(record):
    """The objects of an image, each found."""
    items = [item for item in record["annotations"] if not item["iscrowd"]]
    boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    output = Instances((record["height"], record["width"]))
    output.pred_boxes, output.scores = Boxes(boxes), torch.ones(len(boxes))
    output.pred_classes = torch.tensor([item["category_id"] for item in items])
    return {"instances": output}


@pytest.mark.parametrize(
    ("evaluator", "ids", "expected"),
    [(SubsetCOCOEvaluator, None, 100), (SubsetCOCOEvaluator, [1, 2, 3, 4], 50),
     (COCOEvaluator, None, 50)],
)  # fmt: skip
def test_images_that_were_not_tested_do_not_count(tmp_path, evaluator, ids, expected):
    with registered(write_tiny_coco(tmp_path) / "coco"), forgotten_datasets() as names:
        names.append("first_two")
        records = DatasetCatalog.get("tiny_val")[:2]
        DatasetCatalog.register("first_two", lambda: records)
        metadata = MetadataCatalog.get("tiny_val").as_dict()
        MetadataCatalog.get("first_two").set(**{**metadata, "name": "first_two"})
        evaluator = evaluator("first_two", tasks=("bbox",), distributed=False)
        evaluator.reset()
        for record in records:
            evaluator.process([record], [found(record)])
        # Two of four images.
        assert evaluator.evaluate(ids)["bbox"]["AP"] == pytest.approx(expected, abs=2)
        # All that were tested count, not the last one alone.
        evaluator.reset()
        for record, number in zip(records, (0, None), strict=True):
            output = found(record)["instances"][:number]
            evaluator.process([record], [{"instances": output}])
        assert evaluator.evaluate(ids)["bbox"]["AP"] == pytest.approx(expected / 2, abs=2)


def test_area_and_iscrowd_may_be_missing(tmp_path):
    """What can be told without them is measured as with them."""
    coco = write_tiny_coco(tmp_path) / "coco"
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    with registered(coco):
        records = DatasetCatalog.get("tiny_val")

        def measured():
            evaluator = SubsetCOCOEvaluator("tiny_val", tasks=("bbox",), distributed=False)
            evaluator.reset()
            for record in records:
                evaluator.process([record], [found(record)])
            areas = [item["area"] for item in evaluator._coco_api.dataset["annotations"]]
            return areas, evaluator.evaluate()["bbox"]

        areas, expected = measured()
        for item in content["annotations"]:
            del item["area"]
            if not item["iscrowd"]:
                del item["iscrowd"]
                # Half of the squares are boxes alone.
                item["segmentation"] = item["segmentation"] if item["id"] % 2 else []
        file.write_text(json.dumps(content))
        assert areas == [item["bbox"][2] * item["bbox"][3] for item in content["annotations"]]
        np.testing.assert_equal(measured(), (areas, expected))
