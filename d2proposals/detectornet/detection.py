"""From merged masks to detections, and from the masks of a detection's crop to its refined box.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2, 5.3 and Algorithm 1.

Shape shorthand in this module:

    K: number of classes
    R: number of detections
    d: cells per side of a mask
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..proposals.patches import boxes_from_patch
from .box_search import MaskScores, box_shapes, check_shapes, search_boxes
from .suppression import best_boxes_of_classes
from .windows import MergedMasks

# Detections of a crop's masks: all shapes compete, so that each contributes its best box.
_ONE_PER_SHAPE = 1


class Detections(NamedTuple):
    """Boxes of one image.

    Attributes:
        boxes: (R, 4) XYXY float32, pixels of the image.
        scores: (R,) float32, S of Eq. 3.
        classes: (R,) int64 in [0, K).
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor

    @staticmethod
    def cat(parts: list[Detections]) -> Detections:
        """All detections of several lists."""
        return Detections(*(torch.cat(x) for x in zip(*parts, strict=True)))

    def select(self, index: torch.Tensor) -> Detections:
        """The detections at an index or mask (R,)."""
        return Detections(*(x[index] for x in self))


@dataclass(frozen=True)
class SearchGrid:
    """Boxes that are searched for in a frame.

    Attributes:
        mean_dimensions: (height + width) / 2 of the boxes, relative to the frame's, in (0, 1].
        aspect_ratios: width / height of the boxes.
        stride: distance between positions, in pixels.
        ring: sides of a box with the ring that penalises masks around it, relative to the box's.
        ring_weight: of that penalty; 1 in Eq. 3.
        halves_weight: of the terms of the four halves; 1 in Eq. 3.
        key: where the configuration says these, for messages.
    """

    mean_dimensions: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    stride: float = 5
    ring: float = 1.2
    ring_weight: float = 1.0
    halves_weight: float = 1.0
    key: str = field(default="MODEL.DETECTORNET", compare=False)

    def __post_init__(self) -> None:
        check_shapes(self.key, self.mean_dimensions, self.aspect_ratios, self.stride)
        # Of the whole method, not of a stage.
        for name, value, is_right, rule in (
            ("RING", self.ring, 1 < self.ring < math.inf, "a number above 1"),
            ("RING_WEIGHT", self.ring_weight, 0 <= self.ring_weight < math.inf, "0 or more"),
            ("HALVES_WEIGHT", self.halves_weight, 0 <= self.halves_weight < math.inf, "0 or more"),
        ):
            if not is_right:
                raise ValueError(f"MODEL.DETECTORNET.{name} needs {rule}, got {value}.")


def detect_boxes(
    masks: MergedMasks,
    image_size: tuple[int, int],
    grid: SearchGrid,
    *,
    min_coverage: float,
    topk_per_shape: int,
    nms_thresh: float,
    topk: int,
    nms_type: str = "own_area",
    accepts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    budget: int = 0,
) -> Detections:
    """Bounding boxes of one scale (Sec. 5.2): search, filter by Eq. 2, pruning, suppression.

    Args:
        masks: of the scale, K classes.
        image_size: (H, W) in pixels.
        grid: boxes to search.
        min_coverage: detections are covered more than this by the full mask (Eq. 2).
        topk_per_shape: boxes of each shape that enter non-maximum suppression.
        nms_thresh: overlap above which the box of lower score goes.
        topk: detections of each class.
        nms_type: the overlap, one of :data:`NMS_TYPES`.
        accepts: the classifier's verdict on boxes (R, 4) of classes (R,), (R,) bool; None prunes
            none.
        budget: boxes of each class that it is asked about at most.

    Returns:
        Detections: of each class in turn, best first.
    """
    found = search_boxes(
        MaskScores(masks.values, masks.y_edges, masks.x_edges),
        image_size,
        box_shapes(image_size, grid.mean_dimensions, grid.aspect_ratios),
        stride=grid.stride,
        ring=grid.ring,
        ring_weight=grid.ring_weight,
        halves_weight=grid.halves_weight,
        topk_per_shape=topk_per_shape,
        min_coverage=min_coverage,
    )
    classes, index = best_boxes_of_classes(*found, nms_thresh, topk, nms_type, accepts, budget)
    return Detections(found.boxes[classes, index], found.scores[classes, index], classes)


def best_boxes(
    masks: torch.Tensor, crops: torch.Tensor, frame_side: int, grid: SearchGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest scoring box of each crop (the refinement of Sec. 5.3).

    The search takes place in the pixels of the network's input, to which a crop is mapped: a
    stride in pixels of the image would be too coarse for the crop of a small object.

    Args:
        masks: (R, 5, d, d) in [0, 1], of each crop.
        crops: (R, 4) XYXY, pixels of the image.
        frame_side: of the network's input, in pixels.
        grid: boxes to search, in the frame of the network's input, at least one of which fits.

    Returns:
        Tensor: (R, 4) XYXY float32, pixels of the image.
        Tensor: (R,) float32, S of Eq. 3.
    """
    edges = torch.linspace(
        0, frame_side, masks.shape[-1] + 1, dtype=torch.float64, device=masks.device
    )
    frame_size = (frame_side, frame_side)
    found = search_boxes(
        MaskScores(masks, edges, edges),
        frame_size,
        box_shapes(frame_size, grid.mean_dimensions, grid.aspect_ratios, cut_to_frame=False),
        stride=grid.stride,
        ring=grid.ring,
        ring_weight=grid.ring_weight,
        halves_weight=grid.halves_weight,
        topk_per_shape=_ONE_PER_SHAPE,
    )
    return boxes_from_patch(found.boxes[:, 0], crops, frame_size), found.scores[:, 0]
