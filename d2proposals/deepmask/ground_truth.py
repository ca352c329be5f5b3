"""The objects of a batch, and what each is to the sampling of training patches.

Source: DeepMask, Sec. 3 (constraint ii) and 3.4.

Shape shorthand in this module:

    N: number of images in the batch
    M: number of objects in the batch
    H, W: height and width of the largest image, in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances


@dataclass
class GroundTruth:
    """The objects of a batch.

    Attributes:
        boxes: (M, 4) XYXY, pixels of the network input.
        areas: (M,) in pixels of the native image: annotated ones (``gt_areas``), else the boxes'.
        image_index: (M,) int64.
        number_in_image: (M,) int64, each object's index in its image's instances.
        is_positive: (M,) bool, whether it may be a positive example.
        repels: (M,) bool, whether patches similar to its canonical one are no negatives.
        crowd: (N, H, W) bool, the pixels of crowd regions; None without any.
        image_sizes: (N, 2) float32 (height, width).
        image_scales: (N,) float32, factors from the network input to the native image.
    """

    boxes: torch.Tensor
    areas: torch.Tensor
    image_index: torch.Tensor
    number_in_image: torch.Tensor
    is_positive: torch.Tensor
    repels: torch.Tensor
    crowd: torch.Tensor | None
    image_sizes: torch.Tensor
    image_scales: torch.Tensor

    @classmethod
    def from_instances(
        cls, gt_instances: Sequence[Instances], image_scales: Sequence[float] | None = None
    ) -> GroundTruth:
        """Every object with a box is positive and repels; restrict both afterwards.

        Args:
            gt_instances: of each image, with ``gt_boxes``; ``gt_areas`` and ``crowd_regions`` are
                read if there are any.
            image_scales: see the attribute; 1 by default.
        """
        device = gt_instances[0].gt_boxes.device
        boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances]).float()
        lengths = [len(x) for x in gt_instances]
        image_index = _repeat_index(lengths, device)
        scales = [1.0] * len(lengths) if image_scales is None else list(image_scales)
        scales = torch.tensor(scales, device=device, dtype=torch.float32)
        has_box = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1) & boxes.isfinite().all(dim=1)
        areas = [
            x.gt_areas.float()
            if x.has("gt_areas")
            else x.gt_boxes.area().float() * scales[number] ** 2
            for number, x in enumerate(gt_instances)
        ]
        sizes = torch.tensor([x.image_size for x in gt_instances], device=device)
        return cls(
            boxes=boxes,
            areas=torch.cat(areas),
            image_index=image_index,
            number_in_image=torch.cat([torch.arange(x, device=device) for x in lengths]),
            is_positive=has_box,
            repels=has_box,
            crowd=_draw_crowd(gt_instances),
            image_sizes=sizes.float(),
            image_scales=scales,
        )

    @property
    def centers(self) -> torch.Tensor:
        """(M, 2) x, y."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def sizes(self) -> torch.Tensor:
        """(M,) object sizes."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).amax(dim=1)

    @property
    def native_sides(self) -> torch.Tensor:
        """(M, 2) width and height in pixels of the native image."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]) * self.image_scales[self.image_index, None]

    def in_crowd(self, points: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """Whether points lie in a crowd region of their image.

        Args:
            points: (..., 2) x, y inside the image, in pixels of the network input.
            image_index: (...) int64.

        Returns:
            Tensor: (...) bool.
        """
        if self.crowd is None:
            return torch.zeros_like(image_index, dtype=torch.bool)
        height, width = self.crowd.shape[1:]
        x, y = points.floor().long().unbind(dim=-1)
        return self.crowd[image_index, y.clamp(0, height - 1), x.clamp(0, width - 1)]


def _draw_crowd(gt_instances: Sequence[Instances]) -> torch.Tensor | None:
    """(N, H, W) bool, crowd regions by their masks, or by their boxes where they have none."""
    regions = [x.crowd_regions if x.has("crowd_regions") else None for x in gt_instances]
    if not any(x is not None and len(x.boxes) for x in regions):
        return None
    device = gt_instances[0].gt_boxes.device
    height, width = (max(x.image_size[dim] for x in gt_instances) for dim in (0, 1))
    crowd = torch.zeros(len(regions), height, width, dtype=torch.bool, device=device)
    for number, (instances, region) in enumerate(zip(gt_instances, regions, strict=True)):
        if region is None or len(region.boxes) == 0:
            continue
        rows, columns = instances.image_size
        if region.masks is not None:
            crowd[number, :rows, :columns] = region.masks.tensor.to(device).any(dim=0)
        else:
            crowd[number, :rows, :columns] = _draw_boxes(region.boxes, rows, columns).to(device)
    return crowd


def _draw_boxes(boxes: Boxes, height: int, width: int) -> torch.Tensor:
    """(height, width) bool, the pixels whose centres lie in a box."""
    x1, y1, x2, y2 = boxes.tensor[:, :, None].unbind(dim=1)  # (K, 1) each
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    rows, columns = (y >= y1) & (y < y2), (x >= x1) & (x < x2)
    # A product of matrices instead of (K, height, width).
    return (rows.float().T @ columns.float()) > 0


def _repeat_index(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """0 as often as the first length says, then 1, ..."""
    index = torch.arange(len(lengths), device=device)
    return index.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
