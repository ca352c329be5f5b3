"""Layout of one image of the embedded dataset: which objects lie where, and what is annotated.

Objects are painted one over another, and the annotated mask of an object is its visible part, the
holes cut by later objects filled (polygons, as in COCO, cannot express holes). A later object is
placed only where every earlier one keeps `MIN_VISIBLE` of its pixels, so that each painted
object is annotated. A crowd is a heap of many tiny objects of one category, annotated as one region
with ``iscrowd=1`` and a run-length mask, as in COCO.

Like the outlines, the layout is integer arithmetic throughout: see `shapes_outlines`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .shapes_outlines import (
    CATEGORIES,
    OUTLINES,
    SUBPIXELS,
    UNIT,
    encode_runs,
    polygon_area,
    rasterize_outline,
    trace_polygons,
    transform_outline,
)

# Shortest and longest side of an image, in pixels.
IMAGE_SIDES = (224, 352)
# Most objects that are tried per image, and how often a position is tried for one.
MAX_OBJECTS = 12
MAX_TRIES = 10
# One image in this many has no object; one in this many others has a crowd.
EMPTY_PERIOD = 40
CROWD_PERIOD = 8
# Tiny objects of a crowd, and sides in pixels of the region over which they are strewn.
CROWD_MEMBERS = (12, 30)
CROWD_REGION_SIDES = (24, 64)
# An object keeps at least this part of its pixels, as (numerator, denominator), and this many.
MIN_VISIBLE = (2, 5)
MIN_VISIBLE_PIXELS = 16

# Object sides (square root of the area of the tight box) in 1 / SUBPIXELS pixels: an even draw from
# this table is log-uniform, from 8 px up in steps of 1/32 of an octave.
SIDES = np.rint(8 * SUBPIXELS * 2.0 ** (np.arange(145) / 32)).astype(np.int64)
# Sides of a crowd's members, as a range of the table: 8 to about 12 px.
NUM_CROWD_SIDES = 20
# Factors on an outline's width before rotation: aspect ratios from 1:3 to 3:1, log-uniform.
STRETCHES = np.rint(UNIT * 3.0 ** (np.arange(-16, 17) / 32)).astype(np.int64)
# Half of the objects are tilted by at most this many degrees, the others anyhow.
MAX_TILT = 12


@dataclass(frozen=True)
class Shape:
    """The pixels of one silhouette, or of a heap of them, within an image.

    Attributes:
        category: index into `CATEGORIES`.
        box: (x0, y0, x1, y1) of the crop, in pixels of the image.
        mask: (y1 - y0, x1 - x0) bool. Its first and last row and column are empty unless they lie
            at the border of the image.
        num_pixels: number of pixels, those out of the image included.
    """

    category: int
    box: tuple[int, int, int, int]
    mask: np.ndarray
    num_pixels: int

    @property
    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of the box, as an index into an image."""
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


@dataclass(frozen=True)
class SceneObject:
    """One annotation to be.

    Attributes:
        footprint: the pixels of all members together.
        members: the silhouettes to paint, in order; several for a crowd.
    """

    footprint: Shape
    members: tuple[Shape, ...]

    @property
    def is_crowd(self) -> bool:
        return len(self.members) > 1


@dataclass(frozen=True)
class Layout:
    """All objects of an image, in the order of painting.

    Attributes:
        owner: (H, W) int16, index into ``objects`` of the one seen at each pixel, or -1.
        objects: later ones lie over earlier ones.
    """

    owner: np.ndarray
    objects: tuple[SceneObject, ...]


class _Canvas:
    """A layout in the making: places objects and says where one fits.

    Attributes:
        owner: see `Layout`.
        objects: the objects placed so far.
        num_pixels: (number of objects,) their pixels, those out of the image included.
        num_visible: (number of objects,) their pixels that are seen.
    """

    def __init__(self, height: int, width: int) -> None:
        self.owner = np.full((height, width), -1, dtype=np.int16)
        self.objects: list[SceneObject] = []
        self.num_pixels = np.zeros(0, dtype=np.int64)
        self.num_visible = np.zeros(0, dtype=np.int64)

    def accepts(self, shape: Shape) -> bool:
        """Whether the new shape and, under it, all earlier objects keep enough visible pixels."""
        visible = np.append(self.num_visible - self._count_covered(shape), shape.mask.sum())
        whole = np.append(self.num_pixels, shape.num_pixels)
        enough = visible * MIN_VISIBLE[1] >= whole * MIN_VISIBLE[0]
        return bool(np.all(enough & (visible >= MIN_VISIBLE_PIXELS)))

    def add(self, placed: SceneObject) -> None:
        """Place an object over all others."""
        shape = placed.footprint
        visible = self.num_visible - self._count_covered(shape)
        self.num_visible = np.append(visible, shape.mask.sum())
        self.num_pixels = np.append(self.num_pixels, shape.num_pixels)
        self.owner[shape.crop][shape.mask] = len(self.objects)
        self.objects.append(placed)

    def _count_covered(self, shape: Shape) -> np.ndarray:
        """Count the pixels that each object would lose to a shape."""
        owners = self.owner[shape.crop][shape.mask]
        return np.bincount(owners + 1, minlength=len(self.objects) + 1)[1:]


def sample_layout(rng: np.random.Generator) -> Layout:
    """Draw the size of an image and its objects.

    Args:
        rng: only its ``integers`` is used, which gives the same numbers on every machine.
    """
    height, width = rng.integers(IMAGE_SIDES[0], IMAGE_SIDES[1] + 1, size=2).tolist()
    num_objects = int(rng.integers(1, MAX_OBJECTS + 1))
    if rng.integers(EMPTY_PERIOD) == 0:
        num_objects = 0
    crowd_index = -1
    if num_objects > 0 and rng.integers(CROWD_PERIOD) == 0:
        crowd_index = int(rng.integers(num_objects))

    canvas = _Canvas(height, width)
    for index in range(num_objects):
        sample = _sample_crowd if index == crowd_index else _sample_object
        placed = sample(rng, canvas)
        if placed is not None:
            canvas.add(placed)
    return Layout(owner=canvas.owner, objects=tuple(canvas.objects))


def annotate(layout: Layout) -> list[dict[str, Any]]:
    """Return COCO annotations of a layout, without the ids of annotation and image.

    Coordinates are whole numbers stored as floats: Detectron2 transforms polygons in place, and
    integer arrays would be truncated there.
    """
    return [_annotate_object(layout, index) for index in range(len(layout.objects))]


def _annotate_object(layout: Layout, index: int) -> dict[str, Any]:
    placed = layout.objects[index]
    x0, y0, _, _ = placed.footprint.box
    visible = layout.owner[placed.footprint.crop] == index
    if placed.is_crowd:
        whole = layout.owner == index
        segmentation: Any = {"counts": encode_runs(whole), "size": list(whole.shape)}
        area = int(visible.sum())
        rows, columns = np.nonzero(visible)
        low = np.array([columns.min(), rows.min()])
        high = np.array([columns.max(), rows.max()]) + 1
    else:
        polygons = trace_polygons(visible)
        segmentation = [(polygon + [x0, y0]).ravel().astype(float).tolist() for polygon in polygons]
        area = sum(polygon_area(polygon) for polygon in polygons)
        vertices = np.concatenate(polygons)
        low, high = vertices.min(axis=0), vertices.max(axis=0)
    box = np.concatenate([low + [x0, y0], high - low])
    return {
        "category_id": placed.footprint.category + 1,
        "iscrowd": int(placed.is_crowd),
        "area": float(area),
        "bbox": box.astype(float).tolist(),
        "segmentation": segmentation,
    }


def _sample_outline(rng: np.random.Generator, category: int, num_sides: int) -> np.ndarray:
    """Draw size, aspect ratio and rotation of a silhouette; returns (V, 2) as `OUTLINES`."""
    side = int(SIDES[rng.integers(num_sides)])
    stretch = int(rng.integers(len(STRETCHES)))
    tilted = int(rng.integers(-MAX_TILT, MAX_TILT + 1)) % 360
    turned = int(rng.integers(360))
    degrees = tilted if rng.integers(2) else turned
    factors = (int(STRETCHES[stretch]), int(STRETCHES[-1 - stretch]))
    return transform_outline(OUTLINES[category], factors, degrees, side)


def _place_outline(outline: np.ndarray, category: int, height: int, width: int) -> Shape | None:
    """Rasterise an outline (V, 2) given in image coordinates; None if no pixel is in the image."""
    low = outline.min(axis=0) // SUBPIXELS - 1
    high = -(-outline.max(axis=0) // SUBPIXELS) + 1
    full = rasterize_outline(outline - low * SUBPIXELS, *(high - low)[::-1])
    x0, y0 = np.maximum(low, 0).tolist()
    x1, y1 = np.minimum(high, [width, height]).tolist()
    mask = full[max(y0 - low[1], 0) : y1 - low[1], max(x0 - low[0], 0) : x1 - low[0]]
    if not mask.any():
        return None
    return Shape(category, (x0, y0, x1, y1), mask, int(full.sum()))


def _sample_object(rng: np.random.Generator, canvas: _Canvas) -> SceneObject | None:
    """Draw one object and a position for it; None if no position was found."""
    height, width = canvas.owner.shape
    category = int(rng.integers(len(CATEGORIES)))
    longest = max(height, width) // 2 * SUBPIXELS
    outline = _sample_outline(rng, category, int(np.searchsorted(SIDES, longest, side="right")))
    extent = outline.max(axis=0)
    # At most a quarter of the box reaches over each border of the image.
    low = -extent // 4
    high = np.maximum(np.array([width, height]) * SUBPIXELS - extent * 3 // 4, low + 1)
    for _ in range(MAX_TRIES):
        shape = _place_outline(outline + rng.integers(low, high), category, height, width)
        if shape is not None and canvas.accepts(shape):
            return SceneObject(footprint=shape, members=(shape,))
    return None


def _sample_crowd(rng: np.random.Generator, canvas: _Canvas) -> SceneObject | None:
    """Draw a heap of tiny objects and a position for it; None if no position was found."""
    height, width = canvas.owner.shape
    category = int(rng.integers(len(CATEGORIES)))
    num_members = int(rng.integers(CROWD_MEMBERS[0], CROWD_MEMBERS[1] + 1))
    region = rng.integers(CROWD_REGION_SIDES[0], CROWD_REGION_SIDES[1] + 1, size=2) * SUBPIXELS
    outlines = []
    for _ in range(num_members):
        outline = _sample_outline(rng, category, NUM_CROWD_SIDES)
        # The mean of two draws makes the heap denser in the middle.
        outlines.append(outline + rng.integers(region, size=(2, 2)).sum(axis=0) // 2)
    extent = np.concatenate(outlines).max(axis=0)
    for _ in range(MAX_TRIES):
        position = rng.integers(np.array([width, height]) * SUBPIXELS - extent)
        members = [_place_outline(o + position, category, height, width) for o in outlines]
        placed = tuple(member for member in members if member is not None)
        footprint = _unite(placed, height, width)
        if canvas.accepts(footprint):
            return SceneObject(footprint=footprint, members=placed)
    return None


def _unite(shapes: tuple[Shape, ...], height: int, width: int) -> Shape:
    """Return the union of shapes of one category that lie inside the image."""
    canvas = np.zeros((height, width), dtype=bool)
    for shape in shapes:
        canvas[shape.crop] |= shape.mask
    boxes = np.array([shape.box for shape in shapes])
    x0, y0 = boxes[:, :2].min(axis=0).tolist()
    x1, y1 = boxes[:, 2:].max(axis=0).tolist()
    mask = canvas[y0:y1, x0:x1]
    return Shape(shapes[0].category, (x0, y0, x1, y1), mask, int(mask.sum()))
