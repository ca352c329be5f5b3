"""Size-Aware Dynamic Sampling: which samples SC-RPN's two stages are trained on.

Source: W. Zou, Z. Zhang, Y. Peng, C. Xiang, S. Tian and L. Zhang, "SC-RPN: A Strong Correlation
Learning Framework for Region Proposal", IEEE Transactions on Image Processing 30, 2021,
Sec. III-B: Algorithm 1 with Eq. 1 (Positive Region assigner, first stage) and Algorithm 2 with
Eq. 2 (Size-Aware Threshold assigner, second stage).

Nothing here loops over objects or images. Results do not depend on the padding of the batch or
on the device: ties are broken by position.

Shape shorthand in this module:

    N: number of images in the batch
    L: number of feature maps
    R: number of locations of one image
    M: number of ground-truth objects in the batch
    K: number of candidates in all
    k: candidates per object and feature map (TOPK)

Naming convention:

    level: index of a feature map, 0 for the highest resolution; i_g and j_g of the paper
"""

import math

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou

from .locations import Assignment, GroundTruth, PyramidLocations

# Distances (objects x locations) that are in memory at once; 8 bytes each, and as many again for
# intermediate results.
_MAX_DISTANCES = 1 << 22


def check_strides(strides: list[int]) -> None:
    """Raise ValueError unless each stride is twice the one before it and a power of two."""
    doubling = all(b == 2 * a for a, b in zip(strides, strides[1:], strict=False))
    if not doubling or not math.log2(strides[0]).is_integer():
        raise ValueError(
            "size-aware sampling needs feature maps whose strides are powers of two and double "
            f"from each to the next, got strides {list(strides)} from MODEL.SCRPN.IN_FEATURES"
        )


def object_level(areas: torch.Tensor, num_levels: int, first_stride: int = 4) -> torch.Tensor:
    """Eq. 1: the feature map of objects, i_g = floor((log2 S_g - 9) / 2).

    The paper numbers P2-P6 from 0 and leaves open what happens beyond the ends: the result is
    clamped. For another first stride the formula is shifted, so that the square of 8 strides a
    side (32 pixels on P2) stays in the middle of its feature map's range.

    Args:
        areas: (M,) in square pixels of the network input, positive.
        num_levels: L.
        first_stride: stride of the first feature map, a power of two.

    Returns:
        Tensor: (M,) int64 in [0, L).
    """
    # floor((x - 9) / 2) = floor((floor(x) - 9) / 2), and the exponent that frexp reads from a
    # float's bits is floor(log2) + 1 without rounding errors at powers of two.
    floor_log2 = torch.frexp(areas).exponent.long() - 1
    shift = 2 * int(math.log2(first_stride)) + 5  # 9 for P2
    return torch.div(floor_log2 - shift, 2, rounding_mode="floor").clamp(0, num_levels - 1)


def adjacent_level(
    areas: torch.Tensor, level: torch.Tensor, num_levels: int, first_stride: int = 4
) -> torch.Tensor:
    """Eq. 2: the second feature map of objects, j_g.

    Unlike the paper, whose j_g = i_g - 1 + floor(S_g / 2^(2 i_g + 9)) is never the lower neighbour
    and can skip a level: within a level the quotient lies in [1, 4). The text wants the adjacent
    map, and the equation's domain [2^10, 2^18] is where the nearer neighbour exists. So j_g is
    i_g - 1 if S_g < 2^(2 i_g + 10), else i_g + 1. The domain is half-open, because 2^18 would have
    the neighbour P7.

    Args:
        areas: (M,) in square pixels, positive.
        level: (M,) result of :func:`object_level`.
        num_levels: L.
        first_stride: stride of the first feature map, a power of two.

    Returns:
        Tensor: (M,) int64 in [0, L), or -1 where the object has no second feature map.
    """
    floor_log2 = torch.frexp(areas).exponent.long() - 1
    middle = 2 * level + 2 * int(math.log2(first_stride)) + 6  # 2 i_g + 10 for P2
    neighbour = torch.where(floor_log2 < middle, level - 1, level + 1)
    return torch.where(neighbour < num_levels, neighbour, -1)


def candidate_levels(
    areas: torch.Tensor, num_levels: int, first_stride: int, num_selected: int
) -> torch.Tensor:
    """The feature maps that give an object its candidates in the second stage.

    One: Eq. 1. Two: Eq. 1 and 2, only one beyond the ends of the pyramid. Other numbers (Table V,
    where the paper does not say how they are chosen): those nearest to the object's size.

    Args:
        areas: (M,) in square pixels, positive.
        num_levels: L.
        first_stride: stride of the first feature map, a power of two.
        num_selected: N of the paper.

    Returns:
        Tensor: (M, L) bool.
    """
    level = object_level(areas, num_levels, first_stride)
    maps = torch.arange(num_levels, device=areas.device)
    if num_selected <= 2:
        selected = maps == level[:, None]
        if num_selected == 2:
            neighbour = adjacent_level(areas, level, num_levels, first_stride)
            selected |= maps == neighbour[:, None]
        return selected
    # The level at which the object is a square of 8 strides a side, as a real number.
    exact = (torch.log2(areas.double()) - 2 * math.log2(first_stride) - 6) / 2
    distance = (maps.flip(0) - exact[:, None]).abs()  # flipped: ties go to the coarser map
    nearest = distance.argsort(dim=1, stable=True)[:, :num_selected]
    selected = torch.zeros(len(areas), num_levels, dtype=torch.bool, device=areas.device)
    return selected.scatter_(1, num_levels - 1 - nearest, True)


@torch.no_grad()
def assign_positive_region(
    locations: PyramidLocations,
    ground_truth: GroundTruth,
    sigma: float,
    region: str = "touched",
) -> Assignment:
    """Algorithm 1: locations in the centre region of an object, on the object's feature map.

    The region R_g is the object's box with both sides multiplied by sigma.

    "inside" takes Algorithm 1 by the letter: the locations whose centre is inside R_g. Of a small
    object that often is none.

    "touched" takes the cells that R_g touches, if their centre is inside the object ("all the
    selected positive samples are guaranteed to be inside the ground-truth box"), and always the
    cell that holds the object's centre, so that each object has a positive.

    Unlike the paper, "touched" is the default: the region assigner of the paper's code base, whose
    rule for feature maps is Eq. 1, rounds the region's corners to cells. Where regions overlap, the
    smaller object wins; the paper does not say.

    Args:
        locations: all locations of the batch.
        ground_truth: M objects.
        sigma: center ratio of the positive region, in [0, 1].
        region: "touched" or "inside".

    Returns:
        Assignment: the other locations inside the image are negatives.
    """
    boxes, areas = ground_truth.boxes, ground_truth.areas
    level = object_level(areas, len(locations.strides), locations.strides[0])
    candidate_object, cell = _touched_cells(locations, ground_truth, level, sigma)
    stride = boxes.new_tensor(locations.strides)[level][:, None]  # (M, 1)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    point = (cell + 0.5) * stride[candidate_object]
    if region == "inside":
        half_side = (boxes[:, 2:] - boxes[:, :2]) * (sigma / 2)
        regions = torch.cat([center - half_side, center + half_side], dim=1)
        kept = _is_inside(point, regions[candidate_object])
    else:
        kept = _is_inside(point, boxes[candidate_object])
        extent = locations.extents[ground_truth.image_index, level]
        center_cell = _inside_map((center / stride).floor(), extent)
        kept |= (cell == center_cell[candidate_object]).all(dim=1)
    candidate_object, cell = candidate_object[kept], cell[kept]

    widths = torch.tensor([width for _, width in locations.map_sizes], device=boxes.device)
    starts = torch.tensor(locations.starts, device=boxes.device)
    candidate_level = level[candidate_object]
    candidate = starts[candidate_level] + cell[:, 1] * widths[candidate_level] + cell[:, 0]
    return _resolve_conflicts(
        locations, ground_truth, candidate, candidate_object, -areas[candidate_object]
    )


def _touched_cells(
    locations: PyramidLocations, ground_truth: GroundTruth, level: torch.Tensor, sigma: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells that the centre region of each object touches, at least the one with its centre.

    Args:
        locations, ground_truth, sigma: see :func:`assign_positive_region`.
        level: (M,) feature map of each object.

    Returns:
        Tensor: (K,) the object of each cell, not decreasing.
        Tensor: (K, 2) int64 column and row.
    """
    boxes = ground_truth.boxes
    stride = boxes.new_tensor(locations.strides)[level][:, None]  # (M, 1)
    extent = locations.extents[ground_truth.image_index, level]  # (M, 2) columns, rows
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    half_side = (boxes[:, 2:] - boxes[:, :2]) * (sigma / 2)
    center_cell = _inside_map((center / stride).floor(), extent)
    # A region that ends on the border of a cell does not touch it, on either side.
    first = _inside_map(((center - half_side) / stride).floor(), extent)
    last = _inside_map(((center + half_side) / stride).ceil() - 1, extent).maximum(center_cell)
    counts = last - first + 1  # (M, 2)
    number = counts.prod(dim=1)
    candidate_object = torch.repeat_interleave(number)  # (K,)
    rank = torch.arange(len(candidate_object), device=boxes.device)
    rank = rank - (number.cumsum(dim=0) - number)[candidate_object]
    columns = counts[candidate_object, 0]
    cell = torch.stack([rank % columns, rank // columns], dim=1) + first[candidate_object]
    return candidate_object, cell


def _inside_map(cell: torch.Tensor, extent: torch.Tensor) -> torch.Tensor:
    """Columns and rows (M, 2) moved into maps of ``extent`` columns and rows."""
    return torch.minimum(cell.long().clamp(min=0), extent - 1)


@torch.no_grad()
def assign_size_aware_threshold(
    locations: PyramidLocations,
    ground_truth: GroundTruth,
    init_boxes: torch.Tensor,
    topk: int,
    num_levels: int,
    keep_best: bool = False,
) -> Assignment:
    """Algorithm 2: initial proposals better than the mean of those nearest to an object.

    A sample is at the centre of its initial proposal. Per object, the k nearest samples of each
    selected feature map are its candidates D_g; positives are the candidates whose IoU with the
    object is above the mean IoU m_g of all of them and whose centre is inside the object. A
    candidate of several objects goes to the one with the highest IoU. If no IoU is above the
    mean, because all are equal, the object has no positive, nor if all centres are outside: objects
    of a few pixels seldom hold the centre of an initial proposal.

    Args:
        locations: all locations of the batch.
        ground_truth: M objects.
        init_boxes: (N, R, 4) XYXY, pixels of the network input; initial proposals.
        topk: k, candidates per object and feature map (fewer if the map has fewer cells).
        num_levels: N of the paper, feature maps per object.
        keep_best: whether an object none of whose candidates is positive gets the one with the
            highest IoU, of equal ones the nearest on the first map, if it overlaps at all.

    Returns:
        Assignment: the other locations inside the image are negatives.
    """
    boxes = ground_truth.boxes
    candidates = nearest_candidates(locations, ground_truth, init_boxes, topk, num_levels)
    exists = candidates >= 0  # (M, L*k)
    flat = ground_truth.image_index[:, None] * locations.num_locations + candidates.clamp(min=0)
    candidate_boxes = init_boxes.reshape(-1, 4)[flat]  # (M, L*k, 4)
    iou = matched_pairwise_iou(
        Boxes(candidate_boxes.reshape(-1, 4)),
        Boxes(boxes[:, None].expand_as(candidate_boxes).reshape(-1, 4)),
    ).view(exists.shape)
    # In float64 the mean of equal IoUs is exactly their value, so that none of them exceeds it.
    iou = torch.where(exists, iou, 0).double()
    mean = iou.sum(dim=1, keepdim=True) / exists.sum(dim=1, keepdim=True).clamp(min=1)
    center = (candidate_boxes[..., :2] + candidate_boxes[..., 2:]) / 2
    positive = exists & (iou > mean) & _is_inside(center, boxes[:, None])
    if keep_best:
        best = F.one_hot(iou.argmax(dim=1), iou.shape[1]).bool() & (iou > 0)
        positive |= best & ~positive.any(dim=1, keepdim=True)
    candidate_object = positive.nonzero()[:, 0]
    return _resolve_conflicts(
        locations, ground_truth, candidates[positive], candidate_object, iou[positive]
    )


def nearest_candidates(
    locations: PyramidLocations,
    ground_truth: GroundTruth,
    init_boxes: torch.Tensor,
    topk: int,
    num_levels: int,
) -> torch.Tensor:
    """D_g of Algorithm 2: the k samples nearest to each object on each selected feature map.

    Nearness is the L2 distance between the centres of the initial proposal and of the object.
    Equal distances are ordered by location, row by row.

    Args:
        locations, ground_truth, init_boxes, topk, num_levels: see
            :func:`assign_size_aware_threshold`.

    Returns:
        Tensor: (M, L * k) int64 locations, -1 where there is none.
    """
    centers = (init_boxes[..., :2] + init_boxes[..., 2:]).float() / 2  # (N, R, 2)
    gt_centers = (ground_truth.boxes[:, :2] + ground_truth.boxes[:, 2:]) / 2
    num_maps = len(locations.strides)
    selected = candidate_levels(ground_truth.areas, num_maps, locations.strides[0], num_levels)
    candidates = selected.new_full((len(gt_centers), num_maps, topk), -1, dtype=torch.int64)
    # Objects of one map after the other; two waits for the device, whatever the number of maps.
    objects = selected.t().nonzero()[:, 1].split(selected.sum(dim=0).tolist())
    # No sample of the padding is near to anything.
    coordinates = centers.masked_fill(~locations.is_valid[..., None], math.inf).unbind(dim=2)
    for level in range(num_maps):
        cells = locations.level_slice(level)
        x, y = (values[:, cells].contiguous() for values in coordinates)  # (N, Hi*Wi)
        num_cells = x.shape[1]
        for chunk in objects[level].split(max(1, _MAX_DISTANCES // num_cells)):
            if len(chunk) == 0:
                continue
            image = ground_truth.image_index[chunk]
            squared = (x[image] - gt_centers[chunk, 0, None]).square_()
            squared += (y[image] - gt_centers[chunk, 1, None]).square_()
            nearest, squared = _smallest(squared, min(topk, num_cells))
            nearest = torch.where(squared < math.inf, nearest + cells.start, -1)
            candidates[chunk, level, : nearest.shape[1]] = nearest
    return candidates.flatten(1)


def _smallest(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and values of the k smallest numbers of each row, equal ones by index.

    `torch.topk` leaves open which of several equal numbers it returns. Here the bits of a
    non-negative float32, which are ordered like the float, and the index form one integer.

    Args:
        values: (M, C) float32, not negative, C < 2^31.
        k: at most C.

    Returns:
        Tensor: (M, k) int64 indices, by value and then by index.
        Tensor: (M, k) float32 values.
    """
    keys = values.view(torch.int32).long() << 32
    keys |= torch.arange(values.shape[1], device=values.device)
    indices = keys.topk(k, dim=1, largest=False).values & 0xFFFFFFFF
    return indices, values.gather(1, indices)


def _is_inside(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Whether points (..., 2) lie strictly inside boxes (..., 4): (...) bool."""
    return ((points > boxes[..., :2]) & (points < boxes[..., 2:])).all(dim=-1)


def _resolve_conflicts(
    locations: PyramidLocations,
    ground_truth: GroundTruth,
    candidate: torch.Tensor,
    candidate_object: torch.Tensor,
    priority: torch.Tensor,
) -> Assignment:
    """Give each location to the candidate with the highest priority, the first of equal ones.

    Args:
        locations: all locations of the batch.
        ground_truth: M objects.
        candidate: (K,) locations in [0, R).
        candidate_object: (K,) the object of each candidate, not decreasing.
        priority: (K,).
    """
    num_locations = locations.num_locations
    order = priority.argsort(descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    flat = ground_truth.image_index[candidate_object] * num_locations + candidate
    # The minimum over positions in that order does not depend on the order of execution.
    best = order.new_full((locations.num_images * num_locations,), len(order))
    best.scatter_reduce_(0, flat, position, reduce="amin")
    is_positive = (best < len(order)).view(-1, num_locations)
    # One more entry for "no candidate".
    objects_by_position = torch.cat([candidate_object[order], order.new_full((1,), -1)])
    labels = locations.is_valid.to(torch.int8) - 1  # 0 inside the image, -1 outside
    labels[is_positive] = 1
    return Assignment(labels, objects_by_position[best].view(-1, num_locations))
