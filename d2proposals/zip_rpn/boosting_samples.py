"""Samples for the boosting classifier of ZIP's detector: features of the follow-up blocks, labels.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 4 ("feature boosting").

Shape shorthand in this module:

    R: number of RoIs, of all images
    D: features of an RoI: channels of all blocks
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils.events import EventStorage

from ..proposals.candidates import with_two_fields
from ..proposals.native_size import ImageSizes, given_sizes
from .roi_heads import ZIPHeads


def check_boostable(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: the model is no detector with :class:`ZIPHeads`.
    """
    heads = getattr(model, "roi_heads", None)
    if not isinstance(model, GeneralizedRCNN) or not isinstance(heads, ZIPHeads):
        raise ValueError(
            "Boosting is for ZIP's detector: set MODEL.META_ARCHITECTURE 'GeneralizedRCNN' and "
            f"MODEL.ROI_HEADS.NAME 'ZIPHeads'. This is a {type(model).__name__} with "
            f"{type(heads).__name__}."
        )


@torch.no_grad()
def collect_block_features(
    model: GeneralizedRCNN,
    batches: Iterable[list[dict[str, Any]]],
    *,
    rois_per_image: int,
    max_rois: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of RoIs that the detector sees, sampled as in its training.

    The RoIs are the model's proposals of an evaluation and the objects themselves, matched and
    sampled by the heads (MODEL.ROI_HEADS.IOU_THRESHOLDS, POSITIVE_FRACTION). Memory is that of
    ``max_rois`` samples and of one batch.

    Args:
        model: with :class:`ZIPHeads`, in evaluation mode.
        batches: of inputs with "image" and "instances", as in training. No more of them are looked
            at when there are samples enough.
        rois_per_image: samples of one image at most.
        max_rois: samples at most.

    Returns:
        features (R, D) float32 and labels (R,) int64 in [0, K], K for background.

    Raises:
        ValueError: there are no samples at all.
    """
    check_boostable(model)
    heads = model.roi_heads
    assert not model.training, "boosting reads the features of the evaluation"
    num_features = sum(heads.box_head.block_channels)
    features = np.empty((max_rois, num_features), dtype=np.float32)
    labels = np.empty(max_rois, dtype=np.int64)
    num_rois = 0
    batch_size_per_image = heads.batch_size_per_image
    heads.batch_size_per_image = rois_per_image
    try:
        for batch in batches:
            features_i, labels_i = _batch_samples(model, batch)
            end = min(num_rois + len(labels_i), max_rois)
            features[num_rois:end] = features_i[: end - num_rois].float().cpu().numpy()
            labels[num_rois:end] = labels_i[: end - num_rois].cpu().numpy()
            num_rois = end
            if num_rois == max_rois:
                break
    finally:
        heads.batch_size_per_image = batch_size_per_image
    if num_rois == 0:
        raise ValueError("Boosting found no RoI in the images of DATASETS.TRAIN: it needs images.")
    return features[:num_rois], labels[:num_rois]


def _batch_samples(
    model: GeneralizedRCNN, batch: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (R, D) and labels (R,) of the sampled RoIs of a batch."""
    heads = model.roi_heads
    images = model.preprocess_image(batch)
    targets = [x["instances"].to(model.device) for x in batch]
    maps = model.backbone(images.tensor)
    with given_sizes([ImageSizes.of_input(x) for x in batch]):
        proposals, _ = model.proposal_generator(images, maps, None)
    proposals = [with_two_fields(x) for x in proposals]
    with EventStorage():  # the heads log how many they sample
        proposals = heads.label_and_sample_proposals(proposals, targets)
    maps = heads.pooled_maps(maps, images.image_sizes)
    pooled = heads.box_pooler(list(maps.values()), [p.proposal_boxes for p in proposals])
    return heads.box_head.block_features(pooled), torch.cat([p.gt_classes for p in proposals])
