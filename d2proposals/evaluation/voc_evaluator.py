"""Detections of any dataset with PASCAL VOC's objects, measured as VOC does, by class.

Detectron2's ``PascalVOCDetectionEvaluator`` returns means over the classes, reads XML files alone,
and rounds scores to a thousandth.
"""

import itertools
import logging
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from tabulate import tabulate

from ..data.dataset_reading import DatasetReading, read_dataset
from ..data.paper_splits import load_voc
from .voc_average_precision import IOU_THRESHOLDS, Detections, Objects, average_precisions

logger = logging.getLogger(__name__)

# VOC 2007 to 2009 took the precision at eleven recalls, later years the area under the curve.
FIRST_YEAR_OF_AREA = 2010

# Flags of annotations that make what is found there neither right nor wrong.
_NEITHER_RIGHT_NOR_WRONG = ("difficult", "ignore", "iscrowd")


class VOCEvaluator(DatasetEvaluator):
    """AP of each class; for the measure see ``d2proposals.evaluation.voc_average_precision``.

    Results are ``{"bbox": {name: percent}}``: "AP50-dog" and so on for the classes, "AP50" their
    mean, "AP75" and "AP" (of ten IoU thresholds, .5 to .95) as Detectron2's evaluator has them.
    Classes without objects (but difficult ones) are left out.

    Example::

        register_coco_instances("my_voc", {"year": 2007}, "val.json", "images")
        evaluator = VOCEvaluator("my_voc")
    """

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: a registered dataset, whose metadata has ``year`` (decides how AP is taken
                from the curve). Which objects are difficult is read from its COCO-style file or
                its records (annotations' keys "difficult" and "ignore"), or from VOC's XML files.

        Raises:
            ValueError: the metadata has no year.
        """
        self._dataset_name = dataset_name
        year = MetadataCatalog.get(dataset_name).get("year")
        if year is None:
            raise ValueError(
                f"PASCAL VOC's AP of the dataset '{dataset_name}' depends on the year: set it with "
                f"MetadataCatalog.get('{dataset_name}').set(year=2007)."
            )
        self._eleven_points = int(year) < FIRST_YEAR_OF_AREA
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._detections: dict[str, Detections] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep the detections of a batch.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``: ``pred_boxes``, ``scores`` and ``pred_classes``.
        """
        for input_i, output in zip(inputs, outputs, strict=True):
            self._detections[str(input_i["image_id"])] = _to_detections(output["instances"])

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Measure what was kept, of all processes; None on all but the first."""
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return None
        detections = dict(itertools.chain.from_iterable(part.items() for part in gathered))
        reading = read_dataset(self._dataset_name)
        objects, names = objects_of(reading), reading.category_names
        none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))
        precisions = average_precisions(
            list(objects.values()),
            [detections.get(image_id, none) for image_id in objects],
            len(names),
            eleven_points=self._eleven_points,
        )
        results = _to_results(100 * precisions, names)
        _log_table(results, self._dataset_name, self._eleven_points)
        return {"bbox": results}


def objects_of(reading: DatasetReading) -> dict[str, Objects]:
    """The objects of each image of a dataset by its id; crowd regions and what is to be ignored
    count as difficult.

    Args:
        reading: of a COCO-style file, of records that have "difficult" themselves, or of a dataset
            with VOC's folders (``dirname``, ``split``) in its metadata.
    """
    records = _records_with_difficult(reading)
    return {str(r["image_id"]): _to_objects(r.get("annotations", [])) for r in records}


def _records_with_difficult(reading: DatasetReading) -> list[dict[str, Any]]:
    """Records that say which objects are difficult; Detectron2's reader of VOC's XML does not."""
    metadata = MetadataCatalog.get(reading.name)
    if reading.is_of_file or not (metadata.get("dirname") and metadata.get("split")):
        return reading.records
    # As they were given: once read, only what is difficult has the key.
    given = DatasetCatalog.get(reading.name)
    if any("difficult" in item for record in given for item in record.get("annotations", [])):
        return reading.records
    image_ids = {record["image_id"] for record in reading.records}
    in_xml = load_voc(metadata.dirname, metadata.split, True, metadata.thing_classes)
    return [record for record in in_xml if record["image_id"] in image_ids]


def _to_objects(annotations: list[dict[str, Any]]) -> Objects:
    boxes = [
        BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS)
        for item in annotations
    ]
    return Objects(
        boxes=np.asarray(boxes, np.float64).reshape(-1, 4),
        categories=np.array([item["category_id"] for item in annotations], np.int64),
        is_difficult=np.array(
            [any(item.get(name) for name in _NEITHER_RIGHT_NOR_WRONG) for item in annotations],
            bool,
        ),
    )


def _to_detections(instances: Instances) -> Detections:
    instances = instances.to("cpu")
    return Detections(
        boxes=instances.pred_boxes.tensor.double().numpy(),
        scores=instances.scores.double().numpy(),
        categories=instances.pred_classes.numpy().astype(np.int64),
    )


def _to_results(precisions: np.ndarray, names: list[str]) -> dict[str, float]:
    """Percent by name; ``precisions`` is (K, T)."""
    has_objects = ~np.isnan(precisions[:, 0])
    if not has_objects.any():
        return {}
    mean = precisions[has_objects].mean(axis=0)  # (T,)
    at = {round(100 * threshold): index for index, threshold in enumerate(IOU_THRESHOLDS)}
    results = {"AP": mean.mean(), "AP50": mean[at[50]], "AP75": mean[at[75]]}
    for index in np.flatnonzero(has_objects):
        results[f"AP50-{names[index]}"] = precisions[index, at[50]]
    return {name: float(value) for name, value in results.items()}


def _log_table(results: dict[str, float], dataset_name: str, eleven_points: bool) -> None:
    """Log the means and the classes' AP50, in percent, as two tables."""
    how = "eleven points" if eleven_points else "area under the curve"
    means = {name: value for name, value in results.items() if "-" not in name}
    classes = {name.split("-", 1)[1]: v for name, v in results.items() if "-" in name}
    columns = 6  # names and values, three classes in a row
    cells = [cell for pair in classes.items() for cell in pair]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    if not rows:
        logger.warning(f"The dataset '{dataset_name}' has no objects: nothing to measure.")
        return
    by_class = tabulate(rows, ["class", "AP50"] * (columns // 2), tablefmt="pipe", floatfmt=".2f")
    table = tabulate([means.values()], means, tablefmt="pipe", floatfmt=".2f")
    logger.info(f"PASCAL VOC's AP on {dataset_name} ({how}), percent:\n{table}\n{by_class}")
