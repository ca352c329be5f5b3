"""Export of a trained generator's proposals, for a Fast R-CNN that learns from files of them.

The files are Detectron2's precomputed proposals (``MODEL.LOAD_PROPOSALS``), which the formats'
module ``files.precomputed_format`` describes. A detector that trains on them sees no generator.

Shape shorthand: R proposals of an image.
"""

import logging
import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.structures import Instances
from torch import nn

from ..files.precomputed_format import write_proposal_file
from ..proposals.native_size_hosts import hand_over_native_sizes
from ..proposals.ranking import strictly_decreasing
from .collection import ProposalCollector, in_dataset_order, to_cpu
from .proposal_checks import ImageProposals

logger = logging.getLogger(__name__)


class ProposalExporter(ProposalCollector):
    """Writes the proposals of a dataset to a file in Detectron2's precomputed format.

    Every image of the dataset is listed, those without annotations and those without proposals
    as well. An image's proposals are those of :func:`select_proposals`. Masks are left out; the
    format has none. The file is written by the first process, atomically.
    """

    def __init__(
        self,
        dataset_name: str,
        path: str | os.PathLike,
        *,
        top: int | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered dataset.
            path: of the file to write.
            top: keep so many best-scored proposals of each image; None for all.
            distributed: as for :class:`ProposalCollector`.

        Raises:
            ValueError: if ``top`` is not positive, or an image of the dataset has no id or one
                that another image has.
        """
        if top is not None and top < 1:
            raise ValueError(f"at least 1 proposal of an image is exported, not {top}")
        super().__init__(distributed)
        self._dataset_name = dataset_name
        self._path = path
        self._top = top
        # Read now: what is wrong with the dataset shows before hours of inference.
        self._image_ids = _read_image_ids(dataset_name)

    def _collected(self, instances: list[Instances]) -> list[ImageProposals]:
        return [select_proposals(item, self._top) for item in to_cpu(instances, with_masks=False)]

    def evaluate(self) -> dict[str, float]:
        """Write the file.

        Returns:
            "images" and "proposals", the number of images and the mean number of proposals per
            image; {} but in the first process.
        """
        proposals = self._gather()
        if proposals is None:
            return {}
        ordered = in_dataset_order(proposals, self._image_ids, self._dataset_name)
        write_proposal_file(
            self._path,
            self._image_ids,
            (item.boxes for item in ordered),
            (item.objectness_logits for item in ordered),
        )
        number = sum(ordered.numbers)
        return {"images": len(ordered), "proposals": number / max(len(ordered), 1)}


def select_proposals(proposals: ImageProposals, top: int | None = None) -> ImageProposals:
    """Choose what is worth training on: usable proposals, each once, the best of them.

    Boxes are clipped to the image. Left out are those that are not finite, or empty, and those
    whose score is not finite. Of exactly equal boxes the best-scored one stays. Only then are the
    first ``top`` taken, so that duplicates do not use up their number. Equal scores become
    decreasing ones by the smallest amounts, because Detectron2 reverses their order on reading.

    Args:
        proposals: of one image, whose size is known.
        top: None for all.

    Returns:
        at most ``top`` proposals in the same order, without masks.
    """
    boxes, logits = proposals.boxes, proposals.objectness_logits
    finite = np.isfinite(boxes).all(axis=1) & np.isfinite(logits)
    boxes, logits = boxes[finite], logits[finite]
    height, width = proposals.image_size
    boxes = boxes.clip(0, np.array([width, height, width, height], boxes.dtype))
    nonempty = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    boxes, logits = boxes[nonempty], logits[nonempty]
    kept = _first_of_equals(boxes)[:top]
    ranked = strictly_decreasing(torch.from_numpy(logits[kept])).numpy()
    return ImageProposals(boxes[kept], ranked, proposals.image_size)


def proposal_network_of(model: nn.Module) -> ProposalNetwork:
    """The proposal network in a model: of a two-stage detector, its backbone and generator.

    Args:
        model: a ``ProposalNetwork``, which is returned, or a ``GeneralizedRCNN``, whose heads then
            do not run.

    Returns:
        ProposalNetwork: it tells its generator how large images were before they were resized, if
        that asks (a network that is returned as it is: if it did).

    Raises:
        ValueError: for a model that has no generator.
    """
    if isinstance(model, ProposalNetwork) and model.proposal_generator is not None:
        return model
    if not isinstance(model, GeneralizedRCNN) or model.proposal_generator is None:
        has = "precomputed proposals" if hasattr(model, "proposal_generator") else "no generator"
        raise ValueError(
            "Only proposal networks and two-stage detectors with a generator of their own have "
            f"proposals to export; this {type(model).__name__} has {has}."
        )
    network = ProposalNetwork(
        backbone=model.backbone,
        proposal_generator=model.proposal_generator,
        pixel_mean=model.pixel_mean.flatten().tolist(),
        pixel_std=model.pixel_std.flatten().tolist(),
    )
    return hand_over_native_sizes(network.to(model.device).train(model.training))


def _first_of_equals(boxes: np.ndarray) -> np.ndarray:
    """Increasing indices of (R, 4) boxes without those that an earlier box equals exactly."""
    if not len(boxes):
        return np.zeros(0, np.int64)
    # The sort is stable: the first of a run of equal boxes is the first of the input.
    order = np.lexsort(boxes.T)
    is_new = (boxes[order[1:]] != boxes[order[:-1]]).any(axis=1)
    return np.sort(order[np.concatenate([[True], is_new])])


def _read_image_ids(dataset_name: str) -> Sequence[int | str]:
    records = DatasetCatalog.get(dataset_name)
    if any("image_id" not in record for record in records):
        raise ValueError(f"an image of the dataset {dataset_name!r} has no 'image_id'")
    image_ids = [record["image_id"] for record in records]
    # Detectron2 compares ids as text.
    if len(set(map(str, image_ids))) < len(image_ids):
        raise ValueError(f"an 'image_id' of the dataset {dataset_name!r} occurs more than once")
    return image_ids
