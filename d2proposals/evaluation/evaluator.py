"""Evaluation of object proposals on any registered dataset.

Shape shorthand: R proposals of an image.
"""

import itertools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.structures import Instances
from detectron2.utils import comm

from ..files.atomic_files import write_json
from ..files.figure_file import beside_numbers
from ..files.own_format import write_own_images
from ..files.precomputed_format import write_proposal_file
from ..files.segmentations import filled_boxes
from .collection import ProposalCollector, in_dataset_order, to_cpu
from .ground_truth import GroundTruth, load_ground_truth, warn_of_faults
from .measurement import Measurement, box_overlaps_of, mask_overlaps_of, measure, num_needed
from .proposal_checks import ImageProposals, find_usable
from .proposal_spool import OrderedProposals
from .recall import MAX_LIMIT, check_limits, describe_idle_limits
from .report import format_table, plot_curves
from .unseen_categories import choose_unseen

logger = logging.getLogger(__name__)


class ProposalEvaluator(ProposalCollector):
    """Recall of object proposals; for the measures see ``d2proposals.evaluation.recall``.

    It takes the outputs of Detectron2's ``ProposalNetwork`` and of any model whose outputs have
    "proposals": ``Instances`` with ``proposal_boxes`` and ``objectness_logits`` in pixels of the
    original image. The proposals are ranked by score; equal scores keep the model's order. Boxes
    that are not finite or have a negative side keep their place in the ranking and match nothing.
    What is wrong with the dataset's annotations is one warning for each kind.

    Results are ``{"box_proposals": {name: percent}}``, Detectron2's name of the task, with AR under
    the same names and equal to Detectron2's where every image has proposals. In ``output_dir``
    there are afterwards ``box_proposals.pkl`` (Detectron2's precomputed format, all images),
    ``proposal_results.json`` (measures, curves and diagnostics) and ``proposal_curves.png``.

    Where the proposals have a field ``proposal_masks`` (``ProposalMasks``) and objects of the
    dataset have masks, there is also ``{"mask_proposals": {name: percent}}``: the same measures
    with the IoU of masks, on these objects, of the 2,000 best-scored proposals. Their files are
    ``mask_proposals.json`` (run-length encodings, see ``files.own_format``),
    ``mask_proposal_results.json`` and ``mask_proposal_curves.png``.

    With seen categories there are three more tasks of each kind, "box_proposals_seen",
    "box_proposals_unseen" and "box_proposals_unseen_budget": see ``Measurement.by_categories``.
    """

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        limits: Sequence[int] = (1, 10, 100, 300, 500, 1000),
        count_difficult: bool = True,
        seen: Sequence[str] = (),
        boxes_as_masks: bool = False,
        limit_of_generator: tuple[str, int] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset.
            limits: numbers of best-scored proposals per image at which to measure, up to 2,000.
            count_difficult: whether objects marked difficult count.
            seen: categories that the model was trained on, as of ``find_categories``; () for no
                split.
            boxes_as_masks: give all proposals masks, their filled boxes, in the place of their own.
            limit_of_generator: key that bounds the number of proposals of an image, and that
                number, for a warning; None if nobody knows.
            distributed: collect the proposals of all processes and evaluate them in the first one;
                False if this process sees the whole dataset.
            output_dir: folder for files; None for none.

        Raises:
            ValueError: for wrong limits, for a dataset that is unknown or has image ids that tell
                nothing, and for seen categories that it does not have or that are those of all
                objects or of none.
        """
        super().__init__(distributed)
        self._dataset_name = dataset_name
        self._limits = check_limits(limits)
        self._count_difficult = count_difficult
        self._boxes_as_masks = boxes_as_masks
        self._limit_of_generator = limit_of_generator
        self._output_dir = output_dir
        # Read now: what is wrong with the dataset shows before hours of inference. One process
        # evaluates, so one needs it.
        self._ground_truth = None
        if comm.is_main_process() or not distributed:
            self._ground_truth = load_ground_truth(dataset_name, count_difficult=count_difficult)
            warn_of_faults(self._ground_truth, dataset_name)
            self._unseen = unseen_of(dataset_name, self._ground_truth, seen)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> dict:
        """``ProposalEvaluator(cfg, dataset_name)``.

        Without ``output_dir`` files go to ``inference`` in the configuration's output folder, and
        there to a folder of the dataset's name if there are several test datasets.
        """
        if output_dir is None:
            output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
            if len(cfg.DATASETS.TEST) > 1:
                output_dir = os.path.join(output_dir, dataset_name)
        return {
            "dataset_name": dataset_name,
            "limits": cfg.TEST.PROPOSALS.LIMITS,
            "count_difficult": cfg.TEST.PROPOSALS.COUNT_DIFFICULT,
            "seen": cfg.TEST.PROPOSALS.SEEN,
            "boxes_as_masks": cfg.TEST.PROPOSALS.BOXES_AS_MASKS,
            "limit_of_generator": _limit_of(cfg),
            "distributed": distributed,
            "output_dir": output_dir,
        }

    def _collected(self, instances: list[Instances]) -> list[ImageProposals]:
        proposals = to_cpu(instances, with_masks=not self._boxes_as_masks)
        if not self._boxes_as_masks:
            return proposals
        return [
            item._replace(masks=filled_boxes(item.boxes[:MAX_LIMIT], item.image_size))
            for item in proposals
        ]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluate the proposals since ``reset``.

        Returns:
            The results in the first process (in each one if not distributed), otherwise {}. They
            are {} without any output, and for a dataset without annotations, whose proposals are
            only written.
        """
        proposals = self._gather()
        if proposals is None:
            return {}
        if not proposals:
            logger.warning("ProposalEvaluator did not receive any outputs; nothing is evaluated")
            return {}
        ground_truth = self._ground_truth
        ordered = in_dataset_order(proposals, ground_truth.image_ids, self._dataset_name)
        usable = find_usable(ordered, ground_truth)
        if self._output_dir:
            with _without_losing_numbers("proposals"):
                self._write_proposals(ordered, usable)
        if not ground_truth.is_annotated:
            logger.info(f"{self._dataset_name} has no annotations; proposals are not evaluated")
            return {}
        idle = describe_idle_limits(self._limits, ordered.numbers)
        if idle:
            key, number = self._limit_of_generator or ("", math.inf)
            # Where the generator finds fewer than it may, its limit changes nothing.
            mend = f"; for more raise {key}" if max(ordered.numbers, default=0) >= number else ""
            logger.warning(f"On {self._dataset_name} {idle} (TEST.PROPOSALS.LIMITS){mend}")
        top = num_needed(self._limits, self._unseen)
        overlaps = box_overlaps_of(ground_truth, ordered, usable, top)
        measurement = measure(overlaps, ground_truth, self._limits, self._unseen)
        self._report(measurement, "")
        results = _by_task(measurement, "box_proposals")
        if ordered.has_masks:
            measurement = self._evaluate_masks(ordered, usable)
            if measurement is not None:
                results |= _by_task(measurement, "mask_proposals")
        return results

    def _evaluate_masks(
        self, ordered: OrderedProposals, usable: list[np.ndarray]
    ) -> Measurement | None:
        """Measures of the masks; None if the dataset has none to compare them with."""
        ground_truth = load_ground_truth(
            self._dataset_name, with_masks=True, count_difficult=self._count_difficult
        )
        if ground_truth.segmentations is None:
            logger.info(
                f"objects of {self._dataset_name} have no masks; the proposals' masks are not "
                "evaluated"
            )
            return None
        ground_truth = ground_truth.with_masks()
        top = num_needed(self._limits, self._unseen)
        overlaps = mask_overlaps_of(ground_truth, ordered, usable, top)
        measurement = measure(overlaps, ground_truth, self._limits, self._unseen)
        self._report(measurement, "mask_")
        return measurement

    def _write_proposals(self, ordered: OrderedProposals, usable: list[np.ndarray]) -> None:
        """Write the usable proposals of all images in Detectron2's precomputed format.

        Masks go to a file of their own, since that format has none.
        """
        image_ids = self._ground_truth.image_ids
        path = os.path.join(self._output_dir, "box_proposals.pkl")
        # Read twice, since the file has all boxes before the first score.
        boxes = (x.boxes[usable_i] for x, usable_i in zip(ordered, usable, strict=True))
        logits = (
            x.objectness_logits[usable_i] for x, usable_i in zip(ordered, usable, strict=True)
        )
        write_proposal_file(path, image_ids, boxes, logits)
        if not ordered.has_masks:
            return
        path = os.path.join(self._output_dir, "mask_proposals.json")
        images = zip(image_ids, ordered, usable, strict=True)
        write_own_images(path, itertools.starmap(_with_masks, images))

    def _report(self, measurement: Measurement, prefix: str) -> None:
        """Log the table; write measures and curves into files whose names begin with ``prefix``."""
        num_images = len(self._ground_truth.image_ids)
        num_gt = measurement.num_ground_truth
        kind = "Masks of proposals" if prefix else "Proposals"
        logger.info(
            f"{kind} on {self._dataset_name} ({num_images} images, {num_gt['all']} objects), "
            f"in percent:\n{format_table(measurement.metrics, self._limits)}"
        )
        empty = [name for name, number in num_gt.items() if number == 0]
        if empty:
            logger.info(
                f"{self._dataset_name} has no ground truth for: {', '.join(empty)}; their measures "
                "are left out"
            )
        if self._output_dir:
            content = {
                "dataset": self._dataset_name,
                "limits": list(self._limits),
                "num_images": num_images,
                "num_ground_truth": num_gt,
                "metrics_in_percent": measurement.metrics,
                **(
                    {"metrics_by_categories_in_percent": measurement.by_categories}
                    if measurement.by_categories
                    else {}
                ),
                "curves_in_percent": measurement.curves,
                "diagnostics": measurement.diagnostics,
            }
            path = os.path.join(self._output_dir, f"{prefix}proposal_results.json")
            with _without_losing_numbers("results"):
                write_json(path, content)
            path = os.path.join(self._output_dir, f"{prefix}proposal_curves.png")
            with beside_numbers(path):
                plot_curves(path, measurement.curves, f"{kind} on {self._dataset_name}")


def _limit_of(cfg: CfgNode) -> tuple[str, int] | None:
    """The key that bounds the number of proposals of an image, and that number.

    Of DetectorNet, which suppresses duplicates after it, the number of one scale; None for
    generators of others.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name == "PrecomputedProposals":
        key = "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST"
        return key, cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
    if name == "DetectorNet":
        return "MODEL.DETECTORNET.TOPK_PER_SCALE", cfg.MODEL.DETECTORNET.TOPK_PER_SCALE
    node = cfg.MODEL.get(name.upper(), {})
    if "POST_NMS_TOPK_TEST" not in node:
        return None
    return f"MODEL.{name.upper()}.POST_NMS_TOPK_TEST", node.POST_NMS_TOPK_TEST


def unseen_of(dataset_name: str, ground_truth: GroundTruth, seen: Sequence[str]) -> set[int]:
    """The categories of a dataset that are not among the seen ones; {} without a split.

    Args:
        dataset_name: named in errors.
        ground_truth: of the dataset.
        seen: as ``TEST.PROPOSALS.SEEN``.

    Raises:
        ValueError: as of ``choose_unseen``.
    """
    if not seen or not ground_truth.is_annotated:
        return set()
    try:
        return choose_unseen(ground_truth, None, [str(item) for item in seen])
    except ValueError as error:
        raise ValueError(f"TEST.PROPOSALS.SEEN, of '{dataset_name}': {error}.") from error


@contextmanager
def _without_losing_numbers(what: str) -> Iterator[None]:
    """Write a file; where that fails, an error says so, and the evaluation goes on.

    The numbers, which come after hours of inference, are worth more than the file, which cannot be
    written on a full disk or, of masks, with an infinite logit.

    Args:
        what: is in the file, named in the error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        logger.error(f"The {what} are not kept: {error}")


def _with_masks(
    image_id: int | str, proposals: ImageProposals, usable: np.ndarray
) -> tuple[int | str, np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """An image's id and the boxes, logits and masks of its usable proposals that have masks."""
    masks = list(itertools.compress(proposals.masks or [], usable))
    boxes, logits = proposals.boxes[usable], proposals.objectness_logits[usable]
    return image_id, boxes[: len(masks)], logits[: len(masks)], masks


def _by_task(measurement: Measurement, task: str) -> dict[str, dict[str, float]]:
    """A task's metrics, and those of its subsets of categories under names of their own."""
    subsets = {f"{task}_{name}": metrics for name, metrics in measurement.by_categories.items()}
    return {task: measurement.metrics, **subsets}
