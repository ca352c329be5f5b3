"""The proposals of a dataset, collected from the outputs of a model, in one or several processes.

Shape shorthand: R proposals of an image.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm

from ..files.proposal_set import name_some
from .proposal_checks import ImageProposals
from .proposal_spool import OrderedProposals, ProposalSpool
from .recall import MAX_LIMIT

logger = logging.getLogger(__name__)

# Images whose proposals go from one process to another at once.
_IMAGES_AT_ONCE = 256


class ProposalCollector(DatasetEvaluator):
    """Collects the outputs of Detectron2's ``ProposalNetwork`` for what its subclasses evaluate.

    Any model will do whose outputs have "proposals": ``Instances`` with ``proposal_boxes`` and
    ``objectness_logits`` in pixels of the original image.
    """

    def __init__(self, distributed: bool = True) -> None:
        """
        Args:
            distributed: collect the proposals of all processes in the first one; False if this
                process sees the whole dataset.
        """
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        self._proposals = ProposalSpool()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the proposals of a batch, out of the device's memory and of this process's.

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
                    f"{type(self).__name__} needs 'proposals' in the model's outputs, but they "
                    f"have {sorted(output)}; set MODEL.META_ARCHITECTURE to ProposalNetwork"
                )
        instances = [output["proposals"] for output in outputs]
        for input_, proposals in zip(inputs, self._collected(instances), strict=True):
            self._proposals.add(input_["image_id"], proposals)

    def _collected(self, instances: list[Instances]) -> list[ImageProposals]:
        """What is kept of the proposals of a batch."""
        return to_cpu(instances)

    def _gather(self) -> ProposalSpool | None:
        """The proposals of all processes since ``reset`` by image; None but in the first one."""
        if not self._distributed or comm.get_world_size() == 1:
            return self._proposals
        comm.synchronize()
        own = list(self._proposals)
        most = max(comm.all_gather(len(own)))
        # Some at a time, so that the first process never holds all of them.
        for start in range(0, most, _IMAGES_AT_ONCE):
            some = {x: self._proposals[x] for x in own[start : start + _IMAGES_AT_ONCE]}
            for part in comm.gather(some, dst=0)[1:]:
                # A sampler may give an image to several processes; it counts once.
                for image_id, proposals in part.items():
                    self._proposals.add(image_id, proposals)
        return self._proposals if comm.is_main_process() else None


def to_cpu(instances: list[Instances], *, with_masks: bool = True) -> list[ImageProposals]:
    """The proposals of a batch by descending score, with one transfer for all of them.

    Args:
        instances: per image, in pixels of the original image.
        with_masks: encode the masks of the ``MAX_LIMIT`` best, where there are masks.
    """
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
        # NaN goes last; equal scores keep their order. Most models sort by themselves.
        order = np.arange(len(rows))
        if not (rows[:-1, 4] >= rows[1:, 4]).all():
            order = np.argsort(-rows[:, 4], kind="stable")
            rows = rows[order]
        masks = None
        if with_masks and item.has("proposal_masks"):
            best = torch.from_numpy(order[:MAX_LIMIT]).to(item.proposal_masks.device)
            masks = item.proposal_masks[best].to_rle(*item.image_size)
        proposals.append(ImageProposals(rows[:, :4], rows[:, 4], item.image_size, masks))
    return proposals


def in_dataset_order(
    proposals: ProposalSpool,
    image_ids: Sequence[int | str],
    dataset_name: str,
) -> OrderedProposals:
    """Proposals of every image of a dataset; an image that the model did not see has none.

    Args:
        proposals: by image.
        image_ids: of the dataset.
        dataset_name: named in warnings.
    """
    unseen = [image_id for image_id in image_ids if image_id not in proposals]
    if unseen:
        logger.warning(
            f"{len(unseen)} of {len(image_ids)} images of {dataset_name} were not evaluated and "
            f"count as images without proposals: {name_some(unseen)}"
        )
    foreign = proposals.keys() - set(image_ids)
    if foreign:
        logger.warning(
            f"{len(foreign)} evaluated images do not belong to {dataset_name} and are left out: "
            f"{name_some(sorted(foreign, key=str))}"
        )
    return OrderedProposals(proposals, image_ids)
