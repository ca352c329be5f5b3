"""dyTrainScale: the size at which an image is trained on, chosen by one of its objects.

Li, Liu, Ouyang, Wang. Zoom Out-and-In Network with Map Attention Decision for Region Proposal and
Object Detection. IJCV 2018. Sec. 3.3: "Each sample is resized to the extent where at least one of
the ground truth boxes is covered by the medium anchors."

Unlike the paper, which gives no formula, asks for an object "covered by the medium anchors" and
names their sizes, 64 to 128 pixels (Sec. 5.2), this follows the released training code by default:
an object is drawn, its shorter side gets a random length within reach of the medium anchors, 72 to
128 pixels, and the whole image is scaled with it. By the rule "area" the object gets the area of a
medium anchor instead, or nearly so: "this ensures there are always positive samples" is truer of
it.

Shape shorthand in this module:

    M: number of objects in the image
"""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T

RULES = ("shorter_side", "area")


class ObjectScaleResize(T.Augmentation):
    """Resize an image, its aspect ratio kept, so that one of its objects gets a drawn size.

    Made anew for each image, because it holds that image's boxes.

    Example::

        resize = ObjectScaleResize(
            boxes, object_side=(72, 128), min_image_side=100, max_image_side=1000
        )
        transform = resize.get_transform(image)
    """

    def __init__(
        self,
        boxes: np.ndarray,
        *,
        object_side: tuple[int, int],
        min_image_side: int,
        max_image_side: int,
        rule: str = "shorter_side",
        area_sides: Sequence[int] = (64, 128),
        area_tolerance: float = 0.1,
    ):
        """
        Args:
            boxes: (M, 4) XYXY, pixels of the image before the resize, M >= 1, each box with two
                positive sides (see :func:`measurable_boxes`).
            object_side: lowest and highest length of the drawn object's shorter side, in pixels,
                both included.
            min_image_side: least length of the image's shorter side, in pixels.
            max_image_side: greatest length of the image's longer side, in pixels. It wins where
                both bounds cannot hold.
            rule: one of :data:`RULES`; with "area", ``object_side`` has no effect.
            area_sides: square roots of areas that the drawn object may get, in pixels.
            area_tolerance: they vary uniformly by this share, in [0, 1).
        """
        super().__init__()
        assert rule in RULES, f"rule must be one of {RULES}, got {rule!r}"
        assert len(boxes) > 0, "ObjectScaleResize needs at least one box"
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw an object and a length (Detectron2's seeded numpy generator), and scale to it.

        Args:
            image: (H, W) or (H, W, C).
        """
        height, width = image.shape[:2]
        box = self.boxes[np.random.randint(len(self.boxes))]
        object_width, object_height = box[2:] - box[:2]
        if self.rule == "area":
            spread = np.random.uniform(1 - self.area_tolerance, 1 + self.area_tolerance)
            side = self.area_sides[np.random.randint(len(self.area_sides))] * spread
            scale = side / np.sqrt(object_width * object_height)
        else:
            side = np.random.randint(self.object_side[0], self.object_side[1] + 1)
            scale = side / min(object_width, object_height)
        new_height, new_width = bounded_image_size(
            (height, width), scale, self.min_image_side, self.max_image_side
        )
        return T.ResizeTransform(height, width, new_height, new_width)


def bounded_image_size(
    image_size: tuple[int, int], scale: float, min_image_side: int, max_image_side: int
) -> tuple[int, int]:
    """Scale an image size, as far as the bounds on its sides allow.

    Args:
        image_size: (height, width), in pixels.
        scale: wanted factor, positive.
        min_image_side: least length of the shorter side.
        max_image_side: greatest length of the longer side; it wins over ``min_image_side``.

    Returns:
        (height, width), whole pixels, at least 1 each.
    """
    scale = max(scale, min_image_side / min(image_size))
    scale = min(scale, max_image_side / max(image_size))
    height, width = (max(1, int(side * scale + 0.5)) for side in image_size)
    return height, width


def measurable_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Clip boxes to the image and drop those without width or height there.

    Args:
        boxes: (M, 4) XYXY, pixels.
        image_size: (height, width) of the image that the boxes lie in.

    Returns:
        (M', 4), M' <= M.
    """
    height, width = image_size
    boxes = np.clip(boxes.reshape(-1, 4), 0, [width, height, width, height])
    return boxes[(boxes[:, 2:] - boxes[:, :2]).min(axis=1) > 0]
