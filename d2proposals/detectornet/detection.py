"""From merged masks to detections, and from the masks of a detection's crop to its refined box.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 5.2, 5.3 and Algorithm 1.

Shape shorthand in this module:

    K: number of classes
    R: number of detections
    d: cells per side of a mask
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..proposals.patches import boxes_from_patch
from ..proposals.ranking import first_of_nms
from .box_search import MaskScores, box_shapes, search_boxes
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
        mean_dimensions: (height + width) / 2 of the boxes, relative to the frame's.
        aspect_ratios: width / height of the boxes.
        stride: distance between positions, in pixels.
        ring: sides of a box with the ring that penalises masks around it, relative to the box's.
        ring_weight: of that penalty; 1 in Eq. 3.
    """

    mean_dimensions: tuple[float, ...]
    aspect_ratios: tuple[float, ...]
    stride: float = 5
    ring: float = 1.2
    ring_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, values in (
            ("MEAN_DIMENSIONS", self.mean_dimensions),
            ("ASPECT_RATIOS", self.aspect_ratios),
            ("STRIDE", (self.stride,)),
            ("RING", (self.ring - 1,)),
        ):
            if not values or min(values) <= 0:
                raise ValueError(
                    f"MODEL.DETECTORNET.{name} needs numbers above {int(name == 'RING')}, got "
                    f"{self.ring if name == 'RING' else values}."
                )


def detect_boxes(
    masks: MergedMasks,
    image_size: tuple[int, int],
    grid: SearchGrid,
    *,
    min_coverage: float,
    topk_per_shape: int,
    nms_thresh: float,
    topk: int,
) -> Detections:
    """Bounding boxes of one scale (Sec. 5.2): search, filter by Eq. 2, non-maximum suppression.

    Args:
        masks: of the scale, K classes.
        image_size: (H, W) in pixels.
        grid: boxes to search.
        min_coverage: detections are covered more than this by the full mask (Eq. 2).
        topk_per_shape: boxes of each shape that enter non-maximum suppression.
        nms_thresh: IoU above which the box of lower score goes.
        topk: detections of each class.

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
        topk_per_shape=topk_per_shape,
        min_coverage=min_coverage,
    )
    detections = []
    for class_id, (boxes, scores) in enumerate(zip(found.boxes, found.scores, strict=True)):
        is_found = scores.isfinite()
        boxes, scores = boxes[is_found], scores[is_found]
        kept = first_of_nms(boxes, nms_thresh, topk)
        detections.append(Detections(boxes[kept], scores[kept], torch.full_like(kept, class_id)))
    return Detections.cat(detections)


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
        grid: boxes to search, in the frame of the network's input.

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
        box_shapes(frame_size, grid.mean_dimensions, grid.aspect_ratios),
        stride=grid.stride,
        ring=grid.ring,
        ring_weight=grid.ring_weight,
        topk_per_shape=_ONE_PER_SHAPE,
    )
    return boxes_from_patch(found.boxes[:, 0], crops, frame_size), found.scores[:, 0]
