"""What dyTrainScale does to a dataset: pixels computed, and how often nothing is positive.

Source: H. Li, Y. Liu, W. Ouyang, X. Wang, "Zoom Out-and-In Network with Map Attention Decision for
Region Proposal and Object Detection", IJCV 2019 (arXiv 1709.04347), Sec. 3.3 ("there are always
positive samples in each batch") and Sec. 5.2 ("one third less" training time).

No image is read: sizes and boxes are all that counts.

Shape shorthand in this module:

    D: number of draws
    M: number of objects of an image
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.transforms import Augmentation, ResizeTransform
from detectron2.structures import Boxes, BoxMode

from ..data.mapper import ProposalDatasetMapper
from ..data.size_grouping import SizeGroupedBatches, computed_pixels
from .generator import ZIP
from .gray_class_sampling import POSITIVE


class Draw(NamedTuple):
    """A training image at the size that it was drawn for it.

    Attributes:
        size: (height, width), pixels.
        boxes: (M, 4) float32 XYXY of its objects at that size, crowd left out.
    """

    size: tuple[int, int]
    boxes: np.ndarray


def draw_training_sizes(
    records: Sequence[dict[str, Any]], mapper: ProposalDatasetMapper, num_draws: int
) -> tuple[list[Draw], list[Draw]]:
    """D draws of dyTrainScale, over the images again and again in random order; and fixed sizes.

    Args:
        records: of a dataset, in Detectron2's format, with "height" and "width".
        mapper: with dyTrainScale; its random numbers are numpy's.
        num_draws: D.

    Returns:
        The draws, and the same images at the configuration's usual size.
    """
    fixed_resize = mapper.augmentations.augs[mapper.resize_index]
    order: list[int] = []
    while len(order) < num_draws:
        order.extend(np.random.permutation(len(records)).tolist())
    drawn, fixed = [], []
    for index in order[:num_draws]:
        record = records[index]
        drawn.append(_resized(record, mapper.training_resize(record) or fixed_resize))
        fixed.append(_resized(record, fixed_resize))
    return drawn, fixed


def _resized(record: dict[str, Any], resize: Augmentation) -> Draw:
    # The transform looks at an image's shape alone.
    blank = np.broadcast_to(np.uint8(0), (record["height"], record["width"]))
    transform = resize.get_transform(blank)
    boxes = [
        BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS)
        for x in record["annotations"]
        if x.get("iscrowd", 0) == 0
    ]
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    is_resize = isinstance(transform, ResizeTransform)
    size = (transform.new_h, transform.new_w) if is_resize else blank.shape
    return Draw(size, transform.apply_box(boxes).astype(np.float32))


def batches_in_order(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[np.ndarray]:
    """Batches as Detectron2 makes them, portraits and landscapes apart: (B, 2) sizes each."""
    images = [{"height": height, "width": width} for height, width in sizes]
    return [
        np.array([(image["height"], image["width"]) for image in batch])
        for batch in AspectRatioGroupedDataset(images, batch_size)
    ]


def batches_of_like_sizes(
    sizes: Sequence[tuple[int, int]], batch_size: int, num_batches: int
) -> list[np.ndarray]:
    """Batches of :class:`SizeGroupedBatches`, chosen among ``num_batches`` of them."""
    loader = [[{"image": torch.empty(0, *size)} for size in sizes]]
    return [
        np.array([image["image"].shape[1:] for image in batch])
        for batch in SizeGroupedBatches(loader, batch_size, batch_size * num_batches)
    ]


def pixels_per_image_pixel(batches: Sequence[np.ndarray]) -> float:
    """Pixels computed, padding included, over those of the images."""
    return computed_pixels(batches) / sum(int(sizes.prod(axis=1).sum()) for sizes in batches)


def computed_per_image(batches: Sequence[np.ndarray]) -> float:
    """Mean number of pixels computed for an image."""
    return computed_pixels(batches) / sum(map(len, batches))


@torch.no_grad()
def has_positives(generator: ZIP, draw: Draw) -> bool:
    """Whether any anchor of any level is positive by the generator's labels."""
    maps = [
        torch.empty(1, 0, *(-(-side // stride) for side in draw.size))
        for stride in generator.strides
    ]
    anchors = Boxes.cat(generator.anchor_generator(maps))
    is_valid = torch.ones(len(anchors), dtype=torch.bool)
    labels, _ = generator.labeler(anchors, Boxes(torch.from_numpy(draw.boxes)), is_valid)
    return bool((labels == POSITIVE).any())
