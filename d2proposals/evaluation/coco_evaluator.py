"""COCO's average precision of detections on the images that were tested.

Detectron2's evaluator measures on all images of the dataset's file. A dataset may have some of
them, such as the first 5,000 of val2014: the others' objects would count as missed.
"""

from itertools import chain
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm


class SubsetCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator; images that it was shown nothing of have no part in the figures."""

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
