"""The five box masks of DetectorNet: what the network is to predict, and the loss.

Source: C. Szegedy, A. Toshev and D. Erhan, "Deep Neural Networks for Object Detection", NIPS 2013,
Sec. 4 (loss) and Sec. 5.1 (Eq. 1).

Shape shorthand in this module:

    P: number of crops
    M: number of objects
    K: number of classes; 1 for class-agnostic masks
    d: cells per side of a mask

Naming convention:

    crop: a box of an image, mapped affinely to the network's input and to the mask.
    coverage: part of the area of a cell, or of an interval, that a box or half of it covers.
"""

from __future__ import annotations

import torch

# The order of a network's outputs. The paper's list names the left half twice.
MASK_TYPES = ("full", "bottom", "top", "left", "right")


def interval_coverage(low: torch.Tensor, high: torch.Tensor, num_cells: int) -> torch.Tensor:
    """Part of each cell of a row of cells that an interval covers.

    Args:
        low: any shape, beginning of the interval, in cells.
        high: the same shape, its end; an interval that ends before it begins covers nothing.
        num_cells: cells [0, 1], [1, 2] and so on.

    Returns:
        Tensor: (..., num_cells) in [0, 1].
    """
    cell = torch.arange(num_cells, device=low.device, dtype=low.dtype)
    overlap = torch.minimum(high[..., None], cell + 1) - torch.maximum(low[..., None], cell)
    return overlap.clamp(min=0)


def box_mask_coverage(
    boxes: torch.Tensor, crops: torch.Tensor, mask_size: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Eq. 1 for each crop, object and mask type, as a product of rows and columns.

    A box and a cell T(i, j) are both rectangles, so that the part of the cell that the box covers
    is the covered part of its height times that of its width.

    Args:
        boxes: (M, 4) XYXY, pixels of the image.
        crops: (P, 4) XYXY, pixels of the image, not empty.
        mask_size: d.

    Returns:
        dict[str, tuple[Tensor, Tensor]]: by mask type, coverage of the rows and of the columns,
        each (P, M, d) in [0, 1].
    """
    origin = crops[:, None, :2].repeat(1, 1, 2)
    side = (crops[:, None, 2:] - crops[:, None, :2]).repeat(1, 1, 2)
    x1, y1, x2, y2 = ((boxes[None] - origin) / side * mask_size).unbind(dim=2)  # (P, M) each
    x_mid, y_mid = (x1 + x2) / 2, (y1 + y2) / 2
    rows, columns = (interval_coverage(low, high, mask_size) for low, high in ((y1, y2), (x1, x2)))
    return {
        "full": (rows, columns),
        "bottom": (interval_coverage(y_mid, y2, mask_size), columns),
        "top": (interval_coverage(y1, y_mid, mask_size), columns),
        "left": (rows, interval_coverage(x1, x_mid, mask_size)),
        "right": (rows, interval_coverage(x_mid, x2, mask_size)),
    }


def box_mask_targets(
    boxes: torch.Tensor,
    classes: torch.Tensor,
    crops: torch.Tensor,
    num_classes: int,
    mask_size: int,
) -> torch.Tensor:
    """Ground-truth masks m^h of crops (Eq. 1).

    Where several objects of a class cover a cell, the one that covers most of it counts: a mask
    "represents one or several objects" (Sec. 4).

    Args:
        boxes: (M, 4) XYXY, pixels of the image.
        classes: (M,) int64 in [0, K).
        crops: (P, 4) XYXY, pixels of the image, not empty.
        num_classes: K.
        mask_size: d.

    Returns:
        Tensor: (P, K, 5, d, d) in [0, 1], mask types in the order of :data:`MASK_TYPES`.
    """
    coverage = box_mask_coverage(boxes, crops, mask_size)
    targets = crops.new_zeros(len(crops), num_classes, len(MASK_TYPES), mask_size, mask_size)
    # One type at a time: all objects' masks of all types would take five times the memory.
    for index, mask_type in enumerate(MASK_TYPES):
        rows, columns = coverage[mask_type]
        masks = rows[..., :, None] * columns[..., None, :]  # (P, M, d, d)
        targets[:, :, index].index_reduce_(1, classes, masks, "amax")
    return targets


def unknown_cells(
    gt_masks: torch.Tensor,
    crowd_boxes: torch.Tensor,
    crops: torch.Tensor,
    crowd_classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cells of which nothing is known: in a crowd region of the class, and in no object of it.

    Args:
        gt_masks: (P, K, 5, d, d), see :func:`box_mask_targets`.
        crowd_boxes: (G, 4) XYXY regions that hold objects not in the masks, pixels of the image.
        crops: (P, 4) XYXY, pixels of the image, not empty.
        crowd_classes: (G,) int64 in [0, K), whose objects they hold; None for any class's.

    Returns:
        Tensor: (P, K, 1, d, d) bool; a cell that is partly in a region counts as in it.
    """
    num_classes, mask_size = gt_masks.shape[1], gt_masks.shape[-1]
    rows, columns = box_mask_coverage(crowd_boxes, crops, mask_size)["full"]  # (P, G, d) each
    is_of_class = rows.new_ones(num_classes, len(crowd_boxes))
    if crowd_classes is not None:
        class_ids = torch.arange(num_classes, device=crowd_classes.device)
        is_of_class = (class_ids[:, None] == crowd_classes).to(rows)
    # (P, K, d, G) @ (P, 1, G, d) -> (P, K, d, d)
    rows = (is_of_class[None, :, :, None] * rows[:, None]).transpose(2, 3)
    is_crowd = rows @ columns[:, None] > 0
    has_no_object = gt_masks[:, :, MASK_TYPES.index("full"), None] == 0
    return is_crowd[:, :, None] & has_no_object


def box_mask_loss(
    pred_masks: torch.Tensor,
    gt_masks: torch.Tensor,
    zero_weight: float,
    is_unknown: torch.Tensor | None = None,
) -> torch.Tensor:
    """||(Diag(m) + lambda I)^(1/2) (DNN(x) - m)||^2, summed over all masks (Sec. 4).

    Args:
        pred_masks: any shape, the network's outputs.
        gt_masks: the same shape, m in [0, 1].
        zero_weight: lambda > 0, the weight of an output that is to be 0; one that is to be 1
            weighs 1 + lambda.
        is_unknown: bool, broadcast to that shape: outputs that weigh nothing; none by default.

    Returns:
        Tensor: a scalar.
    """
    weights = gt_masks + zero_weight
    if is_unknown is not None:
        weights = weights.masked_fill(is_unknown, 0)
    return (weights * (pred_masks - gt_masks) ** 2).sum()
