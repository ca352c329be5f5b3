"""Pictures of what a model in training covers and misses, for TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.dataset_reading import read_dataset
from ..data.mapper import ProposalDatasetMapper
from ..evaluation.collection import to_cpu
from ..evaluation.proposal_checks import usable_of
from ..files.image_files import read_rgb_image
from ..pictures.coverage import (
    ProposalPicture,
    object_boxes,
    picture_pixels,
    spread_evenly,
)
from .checked_datasets import checked_dataset
from .detector_proposals import in_original_pixels, recorded_proposals
from .job import is_two_stage

# The same images each time, evenly spread over the dataset, and the best proposals of each.
_NUM_IMAGES = 4
_TOP = 100


def can_show_proposals(cfg: CfgNode) -> bool:
    """Whether a job asks for pictures and has a generator and test images to show."""
    has_generator = not cfg.MODEL.LOAD_PROPOSALS and (
        cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" or is_two_stage(cfg)
    )
    return cfg.VIS_PERIOD > 0 and len(cfg.DATASETS.TEST) > 0 and has_generator


def _has_objects(record: dict[str, Any]) -> bool:
    return any(not item.get("iscrowd", 0) for item in record.get("annotations", ()))


class ProposalPictures(HookBase):
    """Every ``VIS_PERIOD`` iterations, draws the covered and missed objects of a few test images.

    They are of the first dataset of ``DATASETS.TEST``, with the 100 best proposals at IoU .5, of
    proposal networks and of two-stage detectors. The first process draws, the others wait at the
    next iteration. Detectron2's own use of ``VIS_PERIOD``, in detectors, is untouched.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of the job; ``VIS_PERIOD`` is positive and ``DATASETS.TEST`` not empty.
        """
        self._period = cfg.VIS_PERIOD
        self._mapper = ProposalDatasetMapper(cfg, False)
        name = checked_dataset(cfg, cfg.DATASETS.TEST[0], "TEST")
        records = read_dataset(name).records
        records = [x for x in records if _has_objects(x)] or records
        self._records = [records[index] for index in spread_evenly(_NUM_IMAGES, len(records))]

    def after_step(self) -> None:
        """Draw after each ``VIS_PERIOD``-th iteration."""
        if comm.is_main_process() and (self.trainer.iter + 1) % self._period == 0:
            self._draw()

    def _draw(self) -> None:
        model = self.trainer.model
        if isinstance(model, DistributedDataParallel):
            # Whose forward pass in evaluation would wait for the other processes.
            model = model.module
        was_training = model.training
        model.eval()
        # Detectron2's resize draws a random number in tests, too; the training's stay as they are.
        numbers = np.random.get_state()
        try:
            for record in self._records:
                self.trainer.storage.put_image(
                    f"proposals/{record['image_id']}", self._pixels_of(record, model)
                )
        finally:
            model.train(was_training)
            np.random.set_state(numbers)

    def _pixels_of(self, record: dict[str, Any], model: nn.Module) -> torch.Tensor:
        """(3, height, width) uint8 RGB."""
        proposals = to_cpu([_propose(model, self._mapper(record))], with_masks=False)[0]
        size = (record["height"], record["width"]) if "height" in record else None
        picture = ProposalPicture(
            str(record["image_id"]),
            read_rgb_image(record["file_name"], size),
            object_boxes(record),
            proposals.boxes[usable_of(proposals)],
        )
        return torch.from_numpy(picture_pixels(picture, _TOP)).permute(2, 0, 1)


@torch.no_grad()
def _propose(model: nn.Module, mapped: dict[str, Any]) -> Instances:
    """The proposals of an image in its own pixels."""
    if not isinstance(model, GeneralizedRCNN):
        return model([mapped])[0]["proposals"]
    with recorded_proposals(model) as recorder:
        model([mapped])
        (proposals,) = recorder.take([mapped])
    return in_original_pixels(proposals, mapped)
