"""Painting of one image of the embedded dataset.

An image is a textured background, clutter, and the objects of a `Layout` over both. What tells an
object from clutter: an object is a closed silhouette with a texture, shading from one side and a
rim. Clutter is open strokes, marks like writing, pieces of outlines that enclose nothing, and
smudges without a border; it lies below all objects, so that it changes no mask.

All functions are pure but for the generator that they draw from. Images are (H, W, 3) uint8 in BGR
order, as OpenCV writes and Detectron2 reads them by default.
"""

from typing import Any

import cv2
import numpy as np

from .shapes_layout import Layout, Shape, annotate, sample_layout

# Most pieces of clutter per image.
MAX_CLUTTER = 14
# Least distance of an object's mean colour from the background's, summed over the channels.
MIN_COLOR_DISTANCE = 110
LETTERS = "ABCEFGHKLMNSTXYZ23457"


def render_image(seed: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Render one image; it depends on nothing but the two arguments.

    Args:
        seed: number of the series, >= 0.
        index: number of the image in the series, >= 0.

    Returns:
        The image, (H, W, 3) uint8 BGR with sides within `shapes_layout.IMAGE_SIDES`, and its
        annotations in COCO's format without ``id`` and ``image_id``.
    """
    # Two streams, so that a change of painting changes no annotation.
    layout = sample_layout(np.random.default_rng([seed, index, 0]))
    image = paint_layout(np.random.default_rng([seed, index, 1]), layout)
    return image, annotate(layout)


def paint_layout(rng: np.random.Generator, layout: Layout) -> np.ndarray:
    """Paint background, clutter and objects, (H, W, 3) uint8 BGR."""
    height, width = layout.owner.shape
    image = _paint_background(rng, height, width)
    _paint_clutter(rng, image)
    background_color = image.reshape(-1, 3)[::31].mean(axis=0)
    for placed in layout.objects:
        # The members of a crowd look alike.
        color = _object_color(rng, background_color)
        for shape in placed.members:
            _paint_shape(rng, image, shape, color)
    # A camera's blur and grain.
    image = cv2.GaussianBlur(image, (3, 3), sigmaX=0.6)
    grain = rng.integers(-5, 6, size=(height, width, 1), dtype=np.int16)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int, cell: int) -> np.ndarray:
    """Smooth noise with details of about ``cell`` pixels, (height, width) float32 near [0, 1]."""
    coarse = rng.random((height // cell + 2, width // cell + 2), dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _ramp(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Linear ramp in a random direction, (height, width) float32 in [0, 1]."""
    angle = rng.random() * 2 * np.pi
    y = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None]
    x = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :]
    slope_x, slope_y = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return (x * slope_x + y * slope_y) / (abs(slope_x) + abs(slope_y)) + np.float32(0.5)


def _stripes(rng: np.random.Generator, height: int, width: int, period: float) -> np.ndarray:
    """Stripes in a random direction, (height, width) float32, 0 or 1."""
    angle = rng.random() * np.pi
    y = np.arange(height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.arange(width, dtype=np.float32)[None, :] * np.float32(np.cos(angle))
    return (((x + y) / np.float32(period)) % 1 < 0.5).astype(np.float32)


def _patches(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Irregular patches of a few even levels, (height, width) float32 in [0, 1]."""
    levels = int(rng.integers(3, 6))
    noise = _noise(rng, height, width, cell=int(rng.integers(24, 72)))
    return np.floor(np.clip(noise, 0, 0.999) * levels) / np.float32(levels - 1)


def _paint_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blend two colours by a pattern, with fine and coarse noise over all."""
    first = rng.integers(40, 216, size=3).astype(np.float32)
    second = np.clip(first + rng.integers(-70, 71, size=3), 20, 235).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        pattern = _ramp(rng, height, width)
    elif kind == 1:
        pattern = 0.5 * _stripes(rng, height, width, period=float(rng.integers(8, 48)))
        pattern += 0.5 * _ramp(rng, height, width)
    elif kind == 2:
        pattern = _patches(rng, height, width)
    else:
        pattern = _noise(rng, height, width, cell=int(rng.integers(30, 100)))
    coarse = _noise(rng, height, width, cell=12) - 0.5
    fine = _noise(rng, height, width, cell=3) - 0.5
    grey = rng.random() * 40 * coarse + (5 + rng.random() * 35) * fine
    image = (second - first) * pattern[..., None].astype(np.float32)
    image += first
    image += grey[..., None]
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _paint_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Paint what is no object onto the background, in place."""
    height, width = image.shape[:2]
    _paint_smudges(rng, image)
    for _ in range(int(rng.integers(MAX_CLUTTER + 1))):
        position = rng.integers((width, height))
        color = tuple(rng.integers(256, size=3).tolist())
        kind = rng.integers(4)
        if kind == 0:
            _paint_scribble(rng, image, position, color)
        elif kind == 1:
            _paint_writing(rng, image, position, color)
        else:
            _paint_fragment(rng, image, position, color)


def _paint_smudges(rng: np.random.Generator, image: np.ndarray) -> None:
    """Darken or lighten spots without a border, in place."""
    height, width = image.shape[:2]
    coarse = np.zeros((height // 8 + 1, width // 8 + 1), dtype=np.float32)
    for _ in range(int(rng.integers(5))):
        centre = rng.integers(coarse.shape[::-1]).tolist()
        axes = rng.integers(1, 6, size=2).tolist()
        strength = float(rng.integers(12, 36) * rng.choice([-1, 1]))
        cv2.ellipse(coarse, centre, axes, float(rng.integers(180)), 0, 360, strength, cv2.FILLED)
    coarse = cv2.GaussianBlur(coarse, (0, 0), sigmaX=1.2)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    image[:] = np.clip(image + smooth[..., None], 0, 255).astype(np.uint8)


def _paint_scribble(
    rng: np.random.Generator, image: np.ndarray, position: np.ndarray, color: tuple[int, ...]
) -> None:
    """Paint an open stroke that wanders."""
    steps = rng.integers(-24, 25, size=(int(rng.integers(2, 9)), 2))
    points = np.cumsum(np.concatenate([position[None], steps]), axis=0).astype(np.int32)
    cv2.polylines(image, [points], False, color, int(rng.integers(1, 4)), cv2.LINE_AA)


def _paint_writing(
    rng: np.random.Generator, image: np.ndarray, position: np.ndarray, color: tuple[int, ...]
) -> None:
    """Paint a few thin letters."""
    text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=int(rng.integers(2, 7))))
    scale = 0.3 + 0.5 * rng.random()
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(image, text, position.tolist(), font, scale, color, 1, cv2.LINE_AA)


def _paint_fragment(
    rng: np.random.Generator, image: np.ndarray, position: np.ndarray, color: tuple[int, ...]
) -> None:
    """Paint a piece of an outline, an arc or a corner, that encloses nothing."""
    thickness = int(rng.integers(1, 4))
    if rng.integers(2):
        axes = rng.integers(12, 46, size=2).tolist()
        start = float(rng.integers(360))
        end = start + float(rng.integers(40, 160))
        rotation = float(rng.integers(180))
        cv2.ellipse(
            image, position.tolist(), axes, rotation, start, end, color, thickness, cv2.LINE_AA
        )
    else:
        arms = rng.integers(10, 41, size=(2, 2)) * rng.choice([-1, 1], size=(2, 2))
        points = np.stack([position + arms[0], position, position + arms[1]]).astype(np.int32)
        cv2.polylines(image, [points], False, color, thickness, cv2.LINE_AA)


def _object_color(rng: np.random.Generator, background_color: np.ndarray) -> np.ndarray:
    """Draw a colour, (3,) float32, that differs from the mean of the background."""
    colors = rng.integers(20, 236, size=(8, 3)).astype(np.float32)
    distances = np.abs(colors - background_color).sum(axis=1)
    far = np.flatnonzero(distances >= MIN_COLOR_DISTANCE)
    return colors[far[0] if len(far) else distances.argmax()]


def _object_pattern(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw the texture of an object, (height, width) float32 near [0, 1]."""
    kind = rng.integers(5)
    # From three to seven repetitions, whatever the size.
    period = max(3.0, max(height, width) / float(rng.integers(3, 8)))
    if kind == 0:
        return np.zeros((height, width), dtype=np.float32)
    if kind == 1:
        return _stripes(rng, height, width, period)
    if kind == 2:
        first, second = (_stripes(rng, height, width, period) for _ in range(2))
        return np.abs(first - second)
    noise = _noise(rng, height, width, cell=max(2, int(period) // 2))
    return noise if kind == 3 else (noise > 0.6).astype(np.float32)


def _paint_shape(
    rng: np.random.Generator, image: np.ndarray, shape: Shape, color: np.ndarray
) -> None:
    """Paint one silhouette with texture, shading and rim, in place.

    Args:
        rng: random generator.
        image: (H, W, 3) uint8.
        shape: pixels to paint.
        color: (3,) main colour, in [0, 255].
    """
    mask = shape.mask.astype(np.uint8)
    height, width = mask.shape
    second_color = np.clip(color + rng.integers(-90, 91, size=3), 0, 255).astype(np.float32)
    pattern = _object_pattern(rng, height, width)[..., None]
    light = (0.65 + 0.7 * _ramp(rng, height, width))[..., None]
    painted = (color + (second_color - color) * pattern) * light

    # The crop has an empty margin of one pixel inside the image and none at the image's border,
    # where cv2 erodes nothing: an object that is cut off has no rim along the cut.
    rim_width = 1 + min(shape.num_pixels, 6000) // 2000
    inside = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=rim_width)
    rim_color = color * np.float32(0.35) if color.sum() > 255 else 255 - 0.45 * (255 - color)
    painted = np.where(inside[..., None] != 0, painted, rim_color)
    np.copyto(
        image[shape.crop],
        np.clip(painted, 0, 255).astype(np.uint8),
        where=shape.mask[..., None],
    )
