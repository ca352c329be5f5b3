"""Pictures of masks on images, with the objects that they find and miss (DeepMask, Fig. 3, 6)."""

from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances
from matplotlib.axes import Axes
from pycocotools import mask as mask_util

from ..files.image_files import read_rgb_image

# Without red and brown: red is an object without a mask.
_COLORS = tuple(matplotlib.colormaps["tab10"](k)[:3] for k in (0, 1, 2, 4, 6, 7, 8, 9))


def object_masks(record: dict) -> list[dict]:
    """Run-length encodings of an image's objects, without crowd."""
    objects = [x for x in record.get("annotations", []) if not x.get("iscrowd", 0)]
    if any("segmentation" not in x for x in objects):
        raise ValueError(
            f"Objects of {record['file_name']} have no masks to compare with: name a dataset with "
            "masks (--dataset), or draw the best-scored masks (--best)."
        )
    if not objects:
        return []
    size = (record["height"], record["width"])
    objects = [x | {"bbox": [float(v) for v in x["bbox"]]} for x in objects]
    bitmaps = annotations_to_instances(objects, size, mask_format="bitmask").gt_masks.tensor
    return mask_util.encode(np.asfortranarray(bitmaps.permute(1, 2, 0).numpy().astype(np.uint8)))


def draw_masks(axes: Axes, masks: np.ndarray) -> None:
    """Masks (N, H, W) bool in colours, each with its outline."""
    overlay = np.zeros((*masks.shape[1:], 4))
    for number, mask in enumerate(masks):
        overlay[mask] = (*_COLORS[number % len(_COLORS)], 0.5)
    axes.imshow(overlay)
    for number, mask in enumerate(masks):
        draw_outline(axes, mask, _COLORS[number % len(_COLORS)])


def draw_outline(axes: Axes, mask: np.ndarray, color: str | Sequence[float]) -> None:
    """The outline of one mask (H, W), if it has one."""
    if mask.any() and min(mask.shape) > 1:
        axes.contour(mask, levels=[0.5], colors=[color], linewidths=1)


def draw_image(
    axes: Axes,
    record: dict,
    proposals: Instances,
    *,
    top: int = 100,
    iou_threshold: float = 0.5,
    best: int = 0,
) -> tuple[int, int]:
    """Draw one image and masks on it.

    Args:
        axes: where to draw.
        record: the image's dataset dictionary.
        proposals: with ``proposal_masks``.
        top: best proposals, of which the one with the highest IoU is drawn for each object.
        iou_threshold: objects without a mask above it have a red outline.
        best: draw so many best-scored masks instead; 0 to draw objects.

    Returns:
        how many objects were found, and how many there are.

    Raises:
        ValueError: the proposals have no masks, or the objects.
    """
    if not proposals.has("proposal_masks"):
        raise ValueError(
            "The model proposes boxes without masks: draw them with tools/visualize_proposals.py."
        )
    image = read_rgb_image(record["file_name"], (record.get("height"), record.get("width")))
    height, width = image.shape[:2]
    axes.imshow(image)
    axes.set_axis_off()
    order = proposals.objectness_logits.argsort(descending=True, stable=True)
    masks = proposals.proposal_masks[order[: best or top]]
    threshold = masks.threshold
    if best:
        draw_masks(axes, masks.paste(height, width, threshold).cpu().numpy())
        return 0, 0
    objects = object_masks(record)
    encoded = masks.to_rle(height, width, threshold)
    overlaps = np.zeros((len(encoded), len(objects)))
    if encoded and objects:
        overlaps = np.asarray(mask_util.iou(encoded, objects, [0] * len(objects)))
    found = overlaps.max(axis=0, initial=0.0) > iou_threshold
    if found.any():
        chosen = torch.from_numpy(overlaps.argmax(axis=0)[found])
        draw_masks(axes, masks[chosen].paste(height, width, threshold).cpu().numpy())
    for mask in (mask for mask, is_found in zip(objects, found, strict=True) if not is_found):
        draw_outline(axes, mask_util.decode(mask).astype(bool), "red")
    axes.set_title(f"{record['image_id']}: {found.sum()} of {len(objects)}", fontsize=8)
    return int(found.sum()), len(objects)
