"""Evaluation of object proposals on any registered dataset.

Shape shorthand: R proposals of an image.
"""

import itertools
import logging
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm

from ..proposals.atomic_files import write_json
from ..proposals.file_formats import write_proposal_file
from ..proposals.formats_convert import write_proposals
from ..proposals.formats_set import ProposalSet, name_some
from .ground_truth import GroundTruth, load_ground_truth
from .measurement import Measurement, box_overlaps_of, mask_overlaps_of, measure, num_needed
from .proposal_checks import ImageProposals, find_usable
from .recall import MAX_LIMIT, check_limits
from .report import format_table, plot_curves

logger = logging.getLogger(__name__)


class ProposalEvaluator(DatasetEvaluator):
    """Recall of object proposals; for the measures see ``d2proposals.evaluation.recall``.

    It takes the outputs of Detectron2's ``ProposalNetwork`` and of any model whose outputs have
    "proposals": ``Instances`` with ``proposal_boxes`` and ``objectness_logits`` in pixels of the
    original image. The proposals are ranked by score; equal scores keep the model's order. Boxes
    that are not finite or have a negative side keep their place in the ranking and match nothing.

    Results are ``{"box_proposals": {name: percent}}``, Detectron2's name of the task, with AR under
    the same names and equal to Detectron2's where every image has proposals. In ``output_dir``
    there are afterwards ``box_proposals.pkl`` (Detectron2's precomputed format, all images),
    ``proposal_results.json`` (measures, curves and diagnostics) and ``proposal_curves.png``.

    Where the proposals have a field ``proposal_masks`` (``ProposalMasks``) and the dataset has
    masks, there is also ``{"mask_proposals": {name: percent}}``: the same measures with the IoU of
    masks, of the 2,000 best-scored proposals. Their files are ``mask_proposals.json`` (run-length
    encodings, see ``proposals.formats_json``), ``mask_proposal_results.json`` and
    ``mask_proposal_curves.png``.
    """

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        limits: Sequence[int] = (1, 10, 100, 300, 500, 1000),
        distributed: bool = True,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset.
            limits: numbers of best-scored proposals per image at which to measure, up to 2,000.
            distributed: collect the proposals of all processes and evaluate them in the first one;
                False if this process sees the whole dataset.
            output_dir: folder for files; None for none.

        Raises:
            ValueError: for wrong limits, and for a dataset that is unknown or has unusable boxes.
        """
        self._dataset_name = dataset_name
        self._limits = check_limits(limits)
        self._distributed = distributed
        self._output_dir = output_dir
        # Read now: what is wrong with the dataset shows before hours of inference. One process
        # evaluates, so one needs it.
        self._ground_truth = None
        if comm.is_main_process() or not distributed:
            self._ground_truth = load_ground_truth(dataset_name)
        self.reset()

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
            "distributed": distributed,
            "output_dir": output_dir,
        }

    def reset(self) -> None:
        self._proposals: dict[int | str, ImageProposals] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the proposals of a batch on the CPU.

        Args:
            inputs: the model's inputs, with "image_id".
            outputs: the model's outputs, with "proposals".

        Raises:
            ValueError: if the outputs have no proposals.
        """
        if not outputs:
            return
        for output in outputs:
            if "proposals" not in output:
                raise ValueError(
                    "ProposalEvaluator needs 'proposals' in the model's outputs, but they have "
                    f"{sorted(output)}; set MODEL.META_ARCHITECTURE to ProposalNetwork"
                )
        instances = [output["proposals"] for output in outputs]
        for input_, proposals in zip(inputs, _to_cpu(instances), strict=True):
            self._proposals[input_["image_id"]] = proposals

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Evaluate the proposals since ``reset``.

        Returns:
            The results in the first process (in each one if not distributed), otherwise {}. They
            are {} without any output, and for a dataset without annotations, whose proposals are
            only written.
        """
        proposals = self._proposals
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(proposals, dst=0)
            if not comm.is_main_process():
                return {}
            # A sampler may give an image to several processes; it counts once.
            proposals = dict(itertools.chain.from_iterable(part.items() for part in gathered))
        if not proposals:
            logger.warning("ProposalEvaluator did not receive any outputs; nothing is evaluated")
            return {}
        ground_truth = self._ground_truth
        ordered = _in_dataset_order(proposals, ground_truth, self._dataset_name)
        usable = find_usable(ordered, ground_truth)
        if self._output_dir:
            self._write_proposals(ordered, usable)
        if not ground_truth.is_annotated:
            logger.info(f"{self._dataset_name} has no annotations; proposals are not evaluated")
            return {}
        overlaps = box_overlaps_of(ground_truth, ordered, usable, num_needed(self._limits))
        measurement = measure(overlaps, ground_truth, self._limits)
        self._report(measurement, "")
        results = {"box_proposals": measurement.metrics}
        if any(proposals_i.masks is not None for proposals_i in ordered):
            metrics = self._evaluate_masks(ordered, usable)
            if metrics is not None:
                results["mask_proposals"] = metrics
        return results

    def _evaluate_masks(
        self, ordered: list[ImageProposals], usable: list[np.ndarray]
    ) -> dict[str, float] | None:
        """Measures of the masks; None if the dataset has none to compare them with."""
        ground_truth = load_ground_truth(self._dataset_name, with_masks=True)
        if ground_truth.segmentations is None:
            logger.info(
                f"objects of {self._dataset_name} have no masks; the proposals' masks are not "
                "evaluated"
            )
            return None
        overlaps = mask_overlaps_of(ground_truth, ordered, usable, num_needed(self._limits))
        measurement = measure(overlaps, ground_truth, self._limits)
        self._report(measurement, "mask_")
        return measurement.metrics

    def _write_proposals(self, ordered: list[ImageProposals], usable: list[np.ndarray]) -> None:
        """Write the usable proposals of all images in Detectron2's precomputed format.

        Masks go to a file of their own, since that format has none.
        """
        pairs = list(zip(ordered, usable, strict=True))
        boxes = [proposals_i.boxes[usable_i] for proposals_i, usable_i in pairs]
        logits = [proposals_i.objectness_logits[usable_i] for proposals_i, usable_i in pairs]
        image_ids = self._ground_truth.image_ids
        path = os.path.join(self._output_dir, "box_proposals.pkl")
        write_proposal_file(path, image_ids, boxes, logits)
        if not any(proposals_i.masks is not None for proposals_i in ordered):
            return
        masks = [
            list(itertools.compress(proposals_i.masks or [], usable_i))
            for proposals_i, usable_i in pairs
        ]
        numbers = list(map(len, masks))
        with_masks = ProposalSet(
            "d2proposals",
            image_ids,
            [boxes_i[:number] for boxes_i, number in zip(boxes, numbers, strict=True)],
            [logits_i[:number] for logits_i, number in zip(logits, numbers, strict=True)],
            masks,
            scores_are_logits=True,
        )
        path = os.path.join(self._output_dir, "mask_proposals.json")
        write_proposals(path, with_masks, "d2proposals")

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
                "curves_in_percent": measurement.curves,
                "diagnostics": measurement.diagnostics,
            }
            write_json(os.path.join(self._output_dir, f"{prefix}proposal_results.json"), content)
            path = os.path.join(self._output_dir, f"{prefix}proposal_curves.png")
            plot_curves(path, measurement.curves, f"{kind} on {self._dataset_name}")


def _to_cpu(instances: list[Instances]) -> list[ImageProposals]:
    """The proposals of a batch by descending score, with one transfer for all of them."""
    table = torch.cat(
        [
            torch.cat(
                [item.proposal_boxes.tensor.float(), item.objectness_logits.float()[:, None]], dim=1
            )
            for item in instances
        ]
    ).cpu()  # (R of all images, 5)
    proposals = []
    for item, rows in zip(instances, table.split([len(item) for item in instances]), strict=True):
        rows = rows.detach().numpy()
        # NaN goes last; equal scores keep their order.
        order = np.argsort(-rows[:, 4], kind="stable")
        rows = rows[order]
        masks = None
        if item.has("proposal_masks"):
            best = torch.from_numpy(order[:MAX_LIMIT]).to(item.proposal_masks.device)
            masks = item.proposal_masks[best].to_rle(*item.image_size)
        proposals.append(ImageProposals(rows[:, :4], rows[:, 4], item.image_size, masks))
    return proposals


def _in_dataset_order(
    proposals: dict[int | str, ImageProposals], ground_truth: GroundTruth, dataset_name: str
) -> list[ImageProposals]:
    """Proposals of every image of the dataset; an image that the model did not see has none."""
    unseen = [image_id for image_id in ground_truth.image_ids if image_id not in proposals]
    if unseen:
        logger.warning(
            f"{len(unseen)} of {len(ground_truth.image_ids)} images of {dataset_name} were not "
            f"evaluated and count as images without proposals: {name_some(unseen)}"
        )
    foreign = proposals.keys() - set(ground_truth.image_ids)
    if foreign:
        logger.warning(
            f"{len(foreign)} evaluated images do not belong to {dataset_name} and are left out: "
            f"{name_some(sorted(foreign, key=str))}"
        )
    none = ImageProposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), None)
    return [proposals.get(image_id, none) for image_id in ground_truth.image_ids]
