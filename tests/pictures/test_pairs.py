"""Tests of the pairs from which recall is counted, and of masks' outlines."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util

from d2proposals.evaluation.recall import match_proposals
from d2proposals.pictures.mask_outlines import outline_path
from d2proposals.pictures.pairs import find_pairs


def test_pairs_worked_by_hand():
    overlaps = np.array([[0.5, 0.2, 0.8, 0.8], [0.8, 0.0, 0.49, 0.9]], np.float32)
    pairs = find_pairs(overlaps)
    # Of the three of .8 the earlier object's better rank first.
    assert list(zip(pairs.gt.tolist(), pairs.rank.tolist(), strict=True)) == [
        (1, 3), (0, 2), (0, 3), (1, 0), (0, 0),
    ]  # fmt: skip
    np.testing.assert_array_equal(pairs.iou, np.float32([0.9, 0.8, 0.8, 0.8, 0.5]))
    # Better than all before: the second .8 is not, nor is an IoU of 0.
    assert pairs.best_gt.tolist() == [0, 0, 1, 1] and pairs.best_rank.tolist() == [0, 2, 0, 3]
    np.testing.assert_array_equal(pairs.best_iou, np.float32([0.5, 0.8, 0.8, 0.9]))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3)])
def test_no_pairs(shape):
    assert all(len(values) == 0 for values in find_pairs(np.zeros(shape, np.float32)))


def walk(pairs, num_gt, k):
    """Greedy matching by walking through the pairs, as the page does."""
    matched, used = np.zeros(num_gt, np.float32), set()
    for gt, rank, iou in zip(pairs.gt, pairs.rank, pairs.iou, strict=True):
        if rank < k and not matched[gt] and rank not in used:
            matched[gt] = iou
            used.add(rank)
    return matched


@pytest.mark.parametrize("seed", range(20))
def test_walking_through_the_pairs_is_the_evaluators_matching(seed):
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal.
    overlaps = (rng.integers(0, 11, rng.integers(1, 9, 2)) / 10).astype(np.float32)
    num_gt, num_proposals = overlaps.shape
    pairs, numbers = find_pairs(overlaps), range(1, num_proposals + 2)
    matches = match_proposals([overlaps], np.ones(num_gt), numbers)
    for column, k in enumerate(numbers):
        np.testing.assert_array_equal(walk(pairs, num_gt, k), matches.matched_iou[0, :, column])
        best = np.zeros(num_gt, np.float32)
        is_below = pairs.best_rank < k
        best[pairs.best_gt[is_below]] = pairs.best_iou[is_below]  # the last stays
        np.testing.assert_array_equal(best, matches.best_iou[:, column])


def encode(bitmap):
    return mask_util.encode(np.asfortranarray(bitmap, np.uint8))


def fill(path, shape):
    """Fill a path by the even-odd rule; its points are middles of pixels."""
    filled = np.zeros(shape, bool)
    for part in path.split("Z")[:-1]:
        numbers = [float(x) - 0.5 for x in part.removeprefix("M").split()]
        canvas = Image.new("1", shape[::-1])
        ImageDraw.Draw(canvas).polygon(list(zip(numbers[::2], numbers[1::2], strict=True)), 1, 1)
        filled ^= np.array(canvas)
    return filled


def test_outline_of_a_rectangle():
    bitmap = np.zeros((20, 30))
    bitmap[5:15, 10:25] = 1
    points = outline_path(encode(bitmap)).removeprefix("M").removesuffix("Z").split()
    corners = {(float(x), float(y)) for x, y in zip(points[::2], points[1::2], strict=True)}
    assert corners == {(10.5, 5.5), (24.5, 5.5), (24.5, 14.5), (10.5, 14.5)}


def test_outline_of_a_ring_and_of_two_parts():
    y, x = np.mgrid[:80, :120]
    radius = np.hypot(x - 40, y - 40)
    bitmap = ((radius < 35) & (radius > 15)) | (x > 100)
    path = outline_path(encode(bitmap))
    assert path.count("M") == 3 and len(path) < 700
    wrong = fill(path, bitmap.shape) != bitmap
    # At the edges alone: the lines have a width of their own.
    assert wrong.sum() < 0.07 * bitmap.sum() and not wrong[30:50, 45:50].any()


def test_outline_of_nothing_and_of_a_pixel():
    bitmap = np.zeros((9, 9))
    assert outline_path(encode(bitmap)) == ""
    bitmap[3, 4] = 1
    assert outline_path(encode(bitmap)) == "M4.5 3.5Z"
