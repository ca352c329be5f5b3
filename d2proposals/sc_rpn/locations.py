"""The locations of a feature pyramid and the objects of a batch, as flat tensors.

SC-RPN's assigners (Sec. III-B) work on all images, levels and objects of a batch at once. They
read where a location is, which level it belongs to and whether it lies in its image from here.

Shape shorthand in this module:

    N: number of images in the batch
    L: number of feature maps
    Hi, Wi: height and width of feature map i
    R: number of locations of one image, sum of Hi * Wi over the feature maps
    M: number of ground-truth objects in the batch
"""

from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances

from ..proposals.image_extent import valid_cells


@dataclass
class PyramidLocations:
    """Cell centres of all feature maps, concatenated from high to low resolution.

    Detectron2's convention: cell (y, x) of a map of stride s is centred at ((x + 0.5) * s,
    (y + 0.5) * s) in the image.

    Attributes:
        strides: pixels per cell of each feature map.
        map_sizes: (Hi, Wi) of each feature map.
        starts: index of the first location of each feature map.
        centers: (R, 2) float32 (x, y) in pixels.
        stride_of_location: (R,) float32.
        is_valid: (N, R) bool, whether a location is centred inside its image and not in the
            padding of the batch. An image keeps at least one location on each feature map.
        extents: (N, L, 2) int64, number of valid columns and rows (in this order).
    """

    strides: list[int]
    map_sizes: list[tuple[int, int]]
    starts: list[int]
    centers: torch.Tensor
    stride_of_location: torch.Tensor
    is_valid: torch.Tensor
    extents: torch.Tensor

    @classmethod
    def build(
        cls,
        map_sizes: list[tuple[int, int]],
        strides: list[int],
        image_sizes: list[tuple[int, int]] | torch.Tensor,
        device: torch.device,
    ) -> "PyramidLocations":
        """
        Args:
            map_sizes: (Hi, Wi) of each feature map of the padded batch.
            strides: pixels per cell of each feature map.
            image_sizes: (height, width) of each image without its padding, in pixels; or one
                (N, 2) tensor.
            device: of the results.
        """
        sizes = torch.as_tensor(image_sizes, device=device).view(-1, 2)
        starts, centers, stride_of_location, masks, extents = [], [], [], [], []
        start = 0
        for (height, width), stride in zip(map_sizes, strides, strict=True):
            y = (torch.arange(height, device=device) + 0.5) * stride
            x = (torch.arange(width, device=device) + 0.5) * stride
            grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
            centers.append(torch.stack([grid_x.flatten(), grid_y.flatten()], dim=1))
            stride_of_location.append(torch.full_like(grid_x, stride).flatten())
            # A cell is centred inside an image if it begins inside one that is half a cell less.
            inner = (sizes - stride / 2).clamp(min=1)
            mask = valid_cells(inner, (height, width), stride, torch.bool)[:, 0]  # (N, Hi, Wi)
            masks.append(mask.flatten(1))
            extents.append(torch.stack([mask[:, 0].sum(dim=1), mask[:, :, 0].sum(dim=1)], dim=1))
            starts.append(start)
            start = start + height * width  # a tensor in a trace, of which starts has its own
        return cls(
            strides=list(strides),
            map_sizes=list(map_sizes),
            starts=starts,
            centers=torch.cat(centers),
            stride_of_location=torch.cat(stride_of_location),
            is_valid=torch.cat(masks, dim=1),
            extents=torch.stack(extents, dim=1),
        )

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.is_valid)

    @property
    def num_locations(self) -> int:
        """R."""
        return len(self.centers)

    def level_slice(self, level: int, per_location: int = 1) -> slice:
        """The indices of one feature map, in tensors with ``per_location`` entries a location."""
        height, width = self.map_sizes[level]
        start = self.starts[level]
        return slice(start * per_location, (start + height * width) * per_location)


@dataclass
class GroundTruth:
    """The objects of all images of a batch.

    Attributes:
        boxes: (M, 4) float32 XYXY, pixels of the network input, ordered by image.
        image_index: (M,) int64, the image that each object is in.
    """

    boxes: torch.Tensor
    image_index: torch.Tensor

    @classmethod
    def from_instances(cls, gt_instances: list[Instances]) -> "GroundTruth":
        """Collect ``gt_boxes`` of each image. Boxes without area are left out."""
        boxes_per_image = [x.gt_boxes[x.gt_boxes.nonempty()].tensor for x in gt_instances]
        counts = torch.tensor([len(boxes) for boxes in boxes_per_image])
        boxes = torch.cat(boxes_per_image).float()
        image_index = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return cls(boxes, image_index.to(boxes.device))

    @property
    def areas(self) -> torch.Tensor:
        """(M,) areas in square pixels."""
        return Boxes(self.boxes).area()

    def of_image(self, image: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (Mi,) and boxes (Mi, 4) of one image's objects."""
        indices = (self.image_index == image).nonzero().squeeze(1)
        return indices, self.boxes[indices]


@dataclass
class Assignment:
    """Which object each sample is for.

    A sample is a location, or one anchor of a location: R * A samples.

    Attributes:
        labels: (N, R * A) int8. 1: positive. 0: negative. -1: neither (ignored, or centred
            outside its image).
        matched: (N, R * A) int64, index into `GroundTruth.boxes` of positives, otherwise -1.
    """

    labels: torch.Tensor
    matched: torch.Tensor
