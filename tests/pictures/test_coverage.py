"""Tests of the pictures of covered and missed objects."""

import numpy as np
import pytest
from detectron2.structures import BoxMode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from d2proposals.pictures.coverage import (
    ProposalPicture,
    draw_proposals,
    find_covered,
    object_boxes,
    spread_evenly,
    write_contact_sheet,
)

NONE = np.zeros((0, 4), np.float32)
OBJECTS = np.array([[10, 10, 30, 30], [50, 10, 70, 30], [80, 40, 90, 50]], np.float32)
# The first covers the first object by half, the second wholly; the third, two thirds of the second.
PROPOSALS = np.array([[10, 10, 30, 20], [10, 10, 30, 30], [54, 10, 74, 30]], np.float32)


def make_picture(name="1", size=(60, 100), gt_boxes=OBJECTS, proposals=PROPOSALS):
    return ProposalPicture(name, np.full((*size, 3), 128, np.uint8), gt_boxes, proposals)


def draw(picture, **arguments):
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_proposals(axes, picture, **{"top": 100, **arguments})
    return axes


def drawn_boxes(axes):
    """(number of boxes, colour, line width) of each kind, and its boxes as (number, 4) XYXY."""
    kinds = []
    for collection in axes.collections:
        corners = np.array([path.vertices[:4] for path in collection.get_paths()]).reshape(-1, 4, 2)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
        kinds.append((to_hex(collection.get_edgecolor()[0]), collection, boxes))
    return kinds


def test_best_proposals_worked_by_hand():
    found = find_covered(OBJECTS, PROPOSALS, 100)
    np.testing.assert_allclose(found.best_iou, [1, 16 / 24, 0])
    assert found.best_proposal.tolist() == [1, 2, -1]
    assert found.is_covered.tolist() == [True, True, False]
    # Of the best one alone: exactly half is enough at .5, and for nothing above it.
    found = find_covered(OBJECTS, PROPOSALS, 1)
    assert found.is_covered.tolist() == [True, False, False]
    assert find_covered(OBJECTS, PROPOSALS, 1, 0.51).is_covered.tolist() == [False] * 3


def test_threshold_that_float32_does_not_hold():
    found = find_covered([[0, 0, 10, 1]], np.array([[0, 0, 7, 1]]), 1, np.float64(0.7))
    assert found.is_covered.tolist() == [True]


@pytest.mark.parametrize(("gt", "proposals"), [(NONE, PROPOSALS), (OBJECTS, NONE), (NONE, NONE)])
def test_nothing_to_cover_or_to_cover_with(gt, proposals):
    found = find_covered(gt, proposals, 10)
    assert len(found.is_covered) == len(gt) and not found.is_covered.any()
    assert (found.best_proposal == -1).all() and (found.best_iou == 0).all()


def test_drawn_boxes_and_title():
    axes = draw(make_picture("17"))
    assert axes.get_title() == "image 17\ncovered 2 of 3 objects with the top 100"
    (blue, covered, covered_boxes), (yellow, best, best_boxes), (red, missed, missed_boxes) = (
        drawn_boxes(axes)
    )
    np.testing.assert_array_equal(covered_boxes, OBJECTS[:2])
    np.testing.assert_array_equal(best_boxes, PROPOSALS[1:])
    np.testing.assert_array_equal(missed_boxes, OBJECTS[2:])
    assert len({blue, yellow, red}) == 3
    widths = [kind.get_linewidth()[0] for kind in (best, covered, missed)]
    assert widths == sorted(set(widths))  # proposals thin, missed objects thick
    # Only missed objects are dashed.
    assert [kind.get_linestyle()[0][1] is None for kind in (covered, best, missed)] == [
        True,
        True,
        False,
    ]


def test_objects_that_share_a_proposal_share_its_box():
    axes = draw(make_picture(gt_boxes=np.repeat(OBJECTS[:1], 3, axis=0)))
    assert [len(boxes) for _, _, boxes in drawn_boxes(axes)] == [3, 1, 0]


def test_boxes_are_in_the_images_pixels():
    axes = draw(make_picture())
    image = axes.images[0]
    assert list(image.get_extent()) == [0, 100, 60, 0]
    assert axes.get_xlim() == (0, 100) and axes.get_ylim() == (60, 0)


def test_names_that_are_long_or_look_like_formulas():
    axes = draw(make_picture("folder/" * 20 + r"a$\b$.jpg"))
    title = axes.get_title().splitlines()[0]
    assert title.startswith("image ...") and title.endswith(r"a$\b$.jpg") and len(title) == 46
    axes.figure.canvas.draw()


@pytest.mark.parametrize("number", [1, 2, 3, 8, 9])
def test_sheet(tmp_path, number):
    pictures = [
        make_picture("1"),
        make_picture("no objects", gt_boxes=NONE),
        make_picture("no proposals", proposals=NONE),
        make_picture("a tall one", size=(900, 60)),
        make_picture("one pixel", size=(1, 1)),
        make_picture("outside", gt_boxes=OBJECTS + 500),
        *[make_picture(str(index)) for index in range(3)],
    ][:number]
    path = tmp_path / "new" / "sheet.png"
    write_contact_sheet(path, pictures, title="a dataset")
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]
    with Image.open(path) as image:
        columns = {1: 1, 2: 2, 3: 2, 8: 4, 9: 4}[number]
        assert image.format == "PNG" and image.width == columns * 540
        assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_texts_of_a_sheet_do_not_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "d2proposals.files.figure_file.FigureCanvasAgg",
        lambda figure: figures.append(figure) or FigureCanvasAgg(figure),
    )
    sizes = [(60, 100), (100, 60), (500, 60), (60, 500), (60, 100), (100, 100)]
    pictures = [make_picture("x" * 60, size=size) for size in sizes]
    write_contact_sheet(tmp_path / "sheet.png", pictures, title="a dataset")
    (figure,) = figures
    renderer = figure.canvas.get_renderer()
    shown = [axes for axes in figure.axes if axes.axison]
    texts = [axes.title for axes in shown] + [figure.legends[0], figure._suptitle]
    extents = [text.get_window_extent(renderer) for text in texts]
    extents += [axes.get_window_extent(renderer) for axes in shown]
    for index, extent in enumerate(extents):
        assert not any(extent.overlaps(other) for other in extents[index + 1 :])
        assert figure.bbox.padded(1).contains(extent.x0, extent.y0)
        assert figure.bbox.padded(1).contains(extent.x1, extent.y1)


def test_object_boxes_of_a_record():
    annotations = [
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS},
        {"bbox": [5, 6, 7, 8], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 0},
        {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": 1},
    ]
    boxes = object_boxes({"annotations": annotations})
    assert boxes.tolist() == [[1, 2, 4, 6], [5, 6, 7, 8]]
    assert object_boxes({}).shape == (0, 4)
    assert object_boxes({"annotations": annotations[2:]}).shape == (0, 4)


def test_evenly_spread_images():
    assert spread_evenly(3, 11) == [0, 5, 10]
    assert spread_evenly(1, 11) == [0]
    assert spread_evenly(8, 3) == [0, 1, 2]
    assert spread_evenly(8, 0) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: write_contact_sheet(path, []), "needs at least one image"),
        (lambda path: spread_evenly(0, 5), "number of images must be at least 1, not 0"),
        (
            lambda path: write_contact_sheet(path, [make_picture()], top=0),
            "number of top proposals must be at least 1, not 0",
        ),
        (
            lambda path: write_contact_sheet(path, [make_picture()], iou_threshold=50),
            "IoU threshold must be above 0 and at most 1, not 50",
        ),
        (
            lambda path: write_contact_sheet(
                path, [make_picture("5")._replace(image=np.zeros((4, 4)))]
            ),
            r"image 5 has the shape \(4, 4\) and type float64; .* uint8 RGB",
        ),
    ],
)
def test_wrong_input(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []
