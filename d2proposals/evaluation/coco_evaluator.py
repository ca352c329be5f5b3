"""COCO's average precision of detections on the images that were tested.

Detectron2's evaluator measures on all images of the dataset's file. A dataset may have some of
them, such as the first 5,000 of val2014: the others' objects would count as missed.

pycocotools reads the file itself and stops at an annotation without ``iscrowd`` or ``area``, which
Detectron2's reader does not need.
"""

from itertools import chain
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO

from ..files.annotation_cleaning import area_of
from ..files.annotation_values import read_number
from ..files.segmentations import usable_segmentation


class SubsetCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator; images that it was shown nothing of have no part in the figures.

    An annotation without ``iscrowd`` is an object; without ``area`` it has that of its mask, else
    of its box.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """Take the arguments of Detectron2's."""
        super().__init__(*args, **kwargs)
        _fill_in(self._coco_api)

    def reset(self) -> None:
        super().reset()
        self._tested: list[int | str] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the detections of some images; as Detectron2's."""
        super().process(inputs, outputs)
        self._tested += [item["image_id"] for item in inputs]

    def evaluate(self, img_ids: list[int | str] | None = None) -> dict[str, dict[str, float]]:
        """Average precision.

        Args:
            img_ids: of the images to measure on; those that were tested by default.

        Returns:
            measures by task, of the first process; {} in the others.
        """
        if img_ids is None:
            tested = comm.gather(self._tested) if self._distributed else [self._tested]
            img_ids = list(chain(*tested))
        return super().evaluate(img_ids)


def _fill_in(coco: COCO) -> None:
    """Give the annotations of a file the ``iscrowd`` and ``area`` that they lack."""
    for item in coco.dataset.get("annotations", ()):
        if item.get("iscrowd") is None:
            item["iscrowd"] = 0
        if read_number(item.get("area")) is not None:
            continue
        image = coco.imgs.get(item["image_id"], {})
        size = (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None
        mask = usable_segmentation(item.get("segmentation"), size)
        _, _, width, height = item["bbox"]
        item["area"] = area_of({"segmentation": mask}) or width * height
