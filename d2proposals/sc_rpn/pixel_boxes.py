"""Shapes in cells around their locations as boxes in pixels of the network input.

Shape shorthand in this module:

    N: number of images in the batch
    A: number of anchors per location
    D: numbers that a proposal's shape has (points: 18, box: 4)
    R: number of samples of one image, A per location
    S: number of selected samples in the batch
"""

import torch

from .locations import PyramidLocations
from .point_representation import BoxRepresentation, PointRepresentation

Representation = PointRepresentation | BoxRepresentation


def reference_boxes(representation: Representation, locations: PyramidLocations) -> torch.Tensor:
    """(R, 4) anchors, or for points the square that they begin on; XYXY in pixels."""
    references = representation.reference_boxes(locations.centers.device)
    references = references * locations.stride_of_location[:, None, None]
    return (references + locations.centers.repeat(1, 2)[:, None]).flatten(0, 1)


def boxes_in_pixels(
    representation: Representation,
    shape: torch.Tensor,
    locations: PyramidLocations,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Boxes of shapes.

    Args:
        representation: of the shapes.
        shape: (N, R, D) in cells around the location, or (S, D) of the samples ``index``.
        locations: all locations of the batch.
        index: (S,) int64, samples in the flattened (N, R).

    Returns:
        Tensor: (N, R, 4) or (S, 4) XYXY, pixels of the network input.
    """
    per_location = representation.num_anchors
    stride, center = locations.stride_of_location, locations.centers
    if index is None:
        stride = stride.repeat_interleave(per_location)
        center = center.repeat_interleave(per_location, dim=0)
    else:
        location = torch.div(index, per_location, rounding_mode="floor") % len(center)
        stride, center = stride[location], center[location]
    return representation.to_boxes(shape) * stride[:, None] + center.repeat(1, 2)


def valid_samples(representation: Representation, locations: PyramidLocations) -> torch.Tensor:
    """(N, R) bool: whether samples are centred inside their image."""
    return locations.is_valid.repeat_interleave(representation.num_anchors, dim=1)
