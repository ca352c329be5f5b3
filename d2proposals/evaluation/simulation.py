"""Proposals and ground truth of a known kind, to test and to time an evaluation.

Shape shorthand: G ground truths and R proposals of an image.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from .ground_truth import GroundTruth
from .proposal_checks import ImageProposals

_IMAGE_SIZE = (480, 640)
# Share of the proposals that lie about an object, as a trained generator's do.
_SHARE_ON_OBJECTS = 0.5
_NUM_CATEGORIES = 80


def simulate_dataset(
    num_images: int, num_gt: int, seed: int = 0, crowd_share: float = 0.02
) -> list[dict]:
    """Dictionaries of a dataset with objects of log-uniform sides from 8 to 400 pixels.

    Args:
        num_images: images, of 480 x 640 pixels; there is no file behind them.
        num_gt: objects of each image.
        seed: of all that is random.
        crowd_share: expected share of objects that are marked as crowd.

    Returns:
        Records in Detectron2's standard format, boxes XYWH with an ``area`` of 40 to 100 % of the
        box, as that of a mask.
    """
    generator = np.random.default_rng(seed)
    records = []
    for image_id in range(num_images):
        boxes = _random_boxes(generator, num_gt, (8, 400))
        boxes[:, 2:] -= boxes[:, :2]
        areas = boxes[:, 2] * boxes[:, 3] * generator.uniform(0.4, 1.0, num_gt)
        is_crowd = generator.random(num_gt) < crowd_share
        categories = generator.integers(_NUM_CATEGORIES, size=num_gt)
        annotations = [
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "area": area,
                "iscrowd": int(crowd),
                "category_id": category,
            }
            for box, area, crowd, category in zip(
                boxes.tolist(), areas.tolist(), is_crowd.tolist(), categories.tolist(), strict=True
            )
        ]
        records.append(
            {
                "file_name": f"{image_id}.jpg",
                "image_id": image_id,
                "height": _IMAGE_SIZE[0],
                "width": _IMAGE_SIZE[1],
                "annotations": annotations,
            }
        )
    return records


def simulate_outputs(
    records: list[dict], num_proposals: int, seed: int = 1
) -> Iterator[tuple[dict, dict]]:
    """What ``ProposalNetwork`` would return for simulated images.

    Half of the proposals are objects whose corners are moved by 5 to 30 % of their sides
    (standard deviation), the rest lie anywhere; the former have higher scores, with overlap.

    Args:
        records: of ``simulate_dataset``.
        num_proposals: proposals of each image.
        seed: of all that is random.

    Yields:
        (input, output) of each image.
    """
    generator = np.random.default_rng(seed)
    for record in records:
        gt_boxes = np.array([item["bbox"] for item in record["annotations"]]).reshape(-1, 4)
        num_on_objects = int(num_proposals * _SHARE_ON_OBJECTS) if len(gt_boxes) else 0
        chosen = gt_boxes[generator.integers(max(len(gt_boxes), 1), size=num_on_objects)]
        spread = np.tile(chosen[:, 2:], 2) * generator.uniform(0.05, 0.3, (num_on_objects, 1))
        moved = chosen.copy()
        moved[:, 2:] += moved[:, :2]
        moved += spread * generator.normal(size=moved.shape)
        boxes = np.concatenate([moved, _random_boxes(generator, num_proposals - len(moved))])
        scores = generator.normal(size=num_proposals)
        scores[:num_on_objects] += 2
        instances = Instances(_IMAGE_SIZE)
        instances.proposal_boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.proposal_boxes.clip(_IMAGE_SIZE)
        instances.objectness_logits = torch.as_tensor(scores, dtype=torch.float32)
        yield record, {"proposals": instances[instances.proposal_boxes.nonempty()]}


def simulate_masks(
    num_images: int, num_gt: int, num_proposals: int, seed: int = 0
) -> tuple[GroundTruth, list[ImageProposals]]:
    """Ground truth and proposals with masks: ellipses, the proposals' moved and resized.

    Args:
        num_images: images, of 480 x 640 pixels.
        num_gt: objects of each image.
        num_proposals: proposals of each image, in random order; half of them lie about an object.
        seed: of all that is random.
    """
    generator = np.random.default_rng(seed)
    boxes = [_random_boxes(generator, num_gt, (8, 400)) for _ in range(num_images)]
    segmentations = [_encode_ellipses(boxes_i) for boxes_i in boxes]
    proposals = []
    for boxes_i in boxes:
        near = boxes_i[generator.integers(max(num_gt, 1), size=num_proposals // 2 if num_gt else 0)]
        sides = np.tile(near[:, 2:] - near[:, :2], 2)
        near = near + 0.1 * sides * generator.normal(size=near.shape)
        found = np.concatenate([near, _random_boxes(generator, num_proposals - len(near))])
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
        found = generator.permutation(found)
        scores = np.arange(num_proposals, 0, -1, dtype=np.float32)
        masks = _encode_ellipses(found)
        proposals.append(ImageProposals(found.astype(np.float32), scores, None, masks))
    flat = np.concatenate(boxes).astype(np.float32)
    ground_truth = GroundTruth(
        image_ids=list(range(num_images)),
        image_sizes=[_IMAGE_SIZE] * num_images,
        boxes=flat,
        areas=np.concatenate([mask_util.area(items) for items in segmentations]).astype(np.float32),
        categories=generator.integers(_NUM_CATEGORIES, size=len(flat)),
        num_per_image=np.full(num_images, num_gt),
        is_annotated=True,
        segmentations=segmentations,
    )
    return ground_truth, proposals


def _encode_ellipses(boxes: np.ndarray) -> list[dict[str, Any]]:
    """Run-length encodings of the ellipses in (R, 4) XYXY boxes, as polygons of 24 points."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (24, 2)
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    points = centre + circle * (boxes[:, None, 2:] - boxes[:, None, :2]) / 2
    points = np.clip(points, 0, _IMAGE_SIZE[::-1])
    return mask_util.frPyObjects(points.reshape(len(boxes), -1).tolist(), *_IMAGE_SIZE)


def _random_boxes(
    generator: np.random.Generator, number: int, sides: tuple[float, float] = (8, 600)
) -> np.ndarray:
    """(number, 4) XYXY float64 boxes with log-uniform sides, within the image."""
    height, width = _IMAGE_SIZE
    size = np.exp(generator.uniform(*np.log(sides), size=(number, 2)))
    size = np.minimum(size, (width, height))
    corner = generator.uniform(size=(number, 2)) * ((width, height) - size)
    return np.concatenate([corner, corner + size], axis=1)
