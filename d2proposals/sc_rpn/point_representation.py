"""How SC-RPN describes a proposal: nine points, or an anchor's four deltas.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III-C (point-based representation, after Z. Yang et al., "RepPoints", ICCV 2019) and the
anchor-based representation that Tables III and VIII compare it with.

Both representations turn the predictions of a location into a *shape* and a shape into a box. All
of it is measured in cells (strides) around the location, so that one head serves all levels.

Shape shorthand in this module:

    A: number of anchors per location
    D: numbers that a shape has (points: 18, box: 4)
    Hi, Wi: height and width of a feature map
"""

from collections.abc import Sequence

import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from .aligned_convolution import KERNEL_SIZE, NUM_TAPS, kernel_grid

REPRESENTATIONS = ("points", "box")


class PointRepresentation:
    """Nine points; the box is the smallest one that holds them.

    Unlike the paper, which does not say where the points begin, an untrained head predicts a 3x3
    grid over a square of ``side`` cells, the size of the anchor that the other representation
    starts from. Points that begin in one place describe a box without area, whose IoU with any
    object is nearly zero, and learning starts very slowly.

    Nor does it say what an output is measured in. RepPoints has cells; a delta of an anchor is
    measured in the anchor's side, 8 cells, so that a step of the same size moves a box 8 times as
    far, by a gradient 8 times as large.
    """

    num_anchors = 1
    shape_dim = 2 * NUM_TAPS

    def __init__(self, side: float = 8.0, unit: float = 1.0):
        """
        Args:
            side: of the initial square, in cells.
            unit: how far an output of 1 moves a point, in cells.
        """
        self.side = side
        self.unit = unit

    def reference_boxes(self, device: torch.device) -> torch.Tensor:
        """Boxes of an untrained head, (1, 4) XYXY in cells around the location."""
        half = self.side / 2
        return torch.tensor([[-half, -half, half, half]], device=device)

    def decode_init(self, prediction: torch.Tensor) -> torch.Tensor:
        """Initial points from init offsets.

        Args:
            prediction: (..., 1, 18) as (y, x) per point, in units.

        Returns:
            Tensor: (..., 1, 18) points as (y, x), in cells around the location.
        """
        grid = kernel_grid(prediction.device).flatten() * (self.side / 2)
        return self.unit * prediction + grid

    def decode_refined(self, init_shape: torch.Tensor, secondary: torch.Tensor) -> torch.Tensor:
        """Refined points, "combining init offset and secondary offset".

        Gradients do not reach the first stage through them, as in RepPoints: at 20 times the
        weight of the first stage's own loss they would replace it.

        Args:
            init_shape: (..., 18) result of :meth:`decode_init`.
            secondary: (..., 18) secondary offsets, in units.
        """
        return init_shape.detach() + self.unit * secondary

    def to_boxes(self, shape: torch.Tensor) -> torch.Tensor:
        """Smallest boxes that hold the points: (..., 18) -> (..., 4) XYXY, in cells."""
        y, x = shape[..., 0::2], shape[..., 1::2]
        return torch.stack([x.amin(-1), y.amin(-1), x.amax(-1), y.amax(-1)], dim=-1)


class BoxRepresentation:
    """An anchor that is moved and scaled by Detectron2's box transform, once per stage."""

    shape_dim = 4

    def __init__(self, side: float = 8.0, aspect_ratios: Sequence[float] = (1.0,)):
        """
        Args:
            side: square root of the anchors' area, in cells.
            aspect_ratios: height / width, one anchor for each.
        """
        self.side = side
        self.aspect_ratios = tuple(aspect_ratios)
        self.num_anchors = len(self.aspect_ratios)
        self.box2box_transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))

    def reference_boxes(self, device: torch.device) -> torch.Tensor:
        """Anchors, (A, 4) XYXY in cells around the location."""
        ratios = torch.tensor(self.aspect_ratios, dtype=torch.float32, device=device).sqrt()
        half = torch.stack([1 / ratios, ratios], dim=1) * (self.side / 2)
        return torch.cat([-half, half], dim=1)

    def decode_init(self, prediction: torch.Tensor) -> torch.Tensor:
        """Initial boxes: (..., A, 4) deltas (dx, dy, dw, dh) -> (..., A, 4) XYXY, in cells."""
        anchors = self.reference_boxes(prediction.device).expand(prediction.shape)
        return self._apply_deltas(prediction, anchors)

    def decode_refined(self, init_shape: torch.Tensor, secondary: torch.Tensor) -> torch.Tensor:
        """Refined boxes, from deltas (..., 4) to the initial boxes (..., 4), XYXY in cells."""
        return self._apply_deltas(secondary, init_shape.detach())

    def to_boxes(self, shape: torch.Tensor) -> torch.Tensor:
        """The shape is its box."""
        return shape

    def _apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        decoded = self.box2box_transform.apply_deltas(deltas.reshape(-1, 4), boxes.reshape(-1, 4))
        return decoded.view(deltas.shape)


def build_representation(
    name: str, side: float, aspect_ratios: Sequence[float], point_unit: float = 1.0
) -> PointRepresentation | BoxRepresentation:
    """
    Args:
        name: "points" or "box".
        side: of the initial square or anchors, in cells.
        aspect_ratios: of the anchors; points have one square.
        point_unit: how far an output of 1 moves a point, in cells.

    Raises:
        ValueError: unknown name, a size that is not positive, or anchors that points do not have.
    """
    if name not in REPRESENTATIONS:
        raise ValueError(
            f"unknown MODEL.SCRPN.REPRESENTATION {name!r}, choose one of {REPRESENTATIONS}"
        )
    if side <= 0 or not aspect_ratios or min(aspect_ratios) <= 0:
        raise ValueError(
            "MODEL.SCRPN.ANCHOR_SIDE and each of ANCHOR_ASPECT_RATIOS must be positive, "
            f"got {side} and {tuple(aspect_ratios)}"
        )
    if point_unit <= 0:
        raise ValueError(f"MODEL.SCRPN.POINT_UNIT must be positive, got {point_unit}")
    if name == "box":
        return BoxRepresentation(side, aspect_ratios)
    if tuple(aspect_ratios) != (1.0,):
        raise ValueError(
            "points have no anchors: set MODEL.SCRPN.ANCHOR_ASPECT_RATIOS to (1.0,) or "
            f"REPRESENTATION to 'box', got {tuple(aspect_ratios)}"
        )
    return PointRepresentation(side, point_unit)


def point_alignment_offset(points: torch.Tensor, gradient: float) -> torch.Tensor:
    """Offsets of a deformable 3x3 convolution that looks at the nine points.

    Args:
        points: (N, Hi, Wi, 18) as (y, x), in cells around the location.
        gradient: factor on the gradient that flows back to the points, in [0, 1].

    Returns:
        Tensor: (N, 18, Hi, Wi) as (dy, dx) per tap; zero for points on the kernel's own taps.
    """
    points = scale_gradient(points, gradient)
    return (points - kernel_grid(points.device).flatten()).permute(0, 3, 1, 2)


def box_alignment_offset(boxes: torch.Tensor) -> torch.Tensor:
    """Offsets of a deformable 3x3 convolution whose taps are spread evenly over a box.

    The taps sit on the box's corners, the middles of its sides and its centre, as in T. Vu et al.,
    "Cascade RPN", NeurIPS 2019; like there, no gradient flows back to the box.

    Args:
        boxes: (N, Hi, Wi, 4) XYXY, in cells around the location.

    Returns:
        Tensor: (N, 18, Hi, Wi) as (dy, dx) per tap; zero for a box of 2x2 cells around the
        location.
    """
    boxes = boxes.detach()
    center = ((boxes[..., :2] + boxes[..., 2:]) / 2).flip(-1)  # (N, Hi, Wi, 2) as (y, x)
    spacing = (boxes[..., 2:] - boxes[..., :2]).flip(-1) / (KERNEL_SIZE - 1)
    grid = kernel_grid(boxes.device)  # (9, 2)
    offset = center[..., None, :] + grid * (spacing[..., None, :] - 1)  # (N, Hi, Wi, 9, 2)
    return offset.flatten(-2).permute(0, 3, 1, 2)


def scale_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """``x`` itself, with the gradient multiplied by ``factor``."""
    if factor == 0:
        return x.detach()
    # detach() + (x - detach()) keeps the value exactly: the difference is zero.
    return x.detach() + factor * (x - x.detach())
