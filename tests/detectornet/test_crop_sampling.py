"""Crops of Sec. 6: the rules for positives and negatives, their numbers, hopeless images."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from d2proposals.detectornet.crop_sampling import (
    CropSampler,
    sample_classifier_crops,
    sample_mask_crops,
)

SIZE = (240, 320)
OBJECTS = [[20, 30, 60, 50], [200, 100, 310, 230]]


def tensor(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def mask_crops(boxes, crowd=(), size=SIZE, **settings):
    torch.manual_seed(0)
    sampler = CropSampler(**{"num_crops": 100, **settings})
    return sample_mask_crops(sampler, tensor(boxes), tensor(crowd), size)


def classifier_crops(boxes, classes=None, crowd=(), size=SIZE, **settings):
    torch.manual_seed(0)
    sampler = CropSampler(**{"num_crops": 100, "min_scale": 0.1, **settings})
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes
    return sample_classifier_crops(sampler, tensor(boxes), classes, tensor(crowd), size, 3)


def covered_part(crop, box):
    """The part of a box's area that a crop covers, by hand."""
    w = min(crop[2], box[2]) - max(crop[0], box[0])
    h = min(crop[3], box[3]) - max(crop[1], box[1])
    return max(w, 0) * max(h, 0) / ((box[2] - box[0]) * (box[3] - box[1]))


def is_inside(crops, size=SIZE):
    return (crops >= -1e-3).all() and (crops <= tensor([[*size[::-1]] * 2]) + 1e-3).all()


def test_positives_cover_an_object_and_negatives_touch_none():
    crops, is_positive = mask_crops(OBJECTS)
    assert is_positive.sum() == 40 and (~is_positive).sum() == 60
    assert is_inside(crops)
    for crop, positive in zip(crops.tolist(), is_positive.tolist(), strict=True):
        parts = [covered_part(crop, box) for box in OBJECTS]
        assert max(parts) >= 0.8 - 1e-6 if positive else max(parts) == 0


def test_some_positives_cut_their_object():
    # The rule is 80 %, not all of the object.
    crops, is_positive = mask_crops(OBJECTS[1:], num_crops=500)
    parts = [covered_part(x, OBJECTS[1]) for x in crops[is_positive].tolist()]
    assert 0.8 - 1e-6 <= min(parts) < 0.85


def test_widths_are_uniform_and_crops_have_the_image_s_aspect_ratio():
    # Without objects, all candidates are negatives.
    crops, _ = mask_crops([], num_crops=4000, positive_fraction=0.0, min_scale=0.25)
    sides = crops[:, 2:] - crops[:, :2]
    torch.testing.assert_close(sides[:, 0] * 240, sides[:, 1] * 320, rtol=1e-3, atol=1e-1)
    share = torch.histc(sides[:, 0], bins=6, min=80, max=320) / len(sides)
    assert ((share - 1 / 6).abs() < 0.03).all() and share.sum() == pytest.approx(1)
    # Positions are uniform, and those along both axes have nothing to do with each other.
    room = torch.tensor([320.0, 240.0]) - sides
    position = (crops[:, :2] / room)[room[:, 0] > 1]
    for axis in position.T:
        share = torch.histc(axis, bins=5, min=0, max=1) / len(axis)
        assert ((share - 1 / 5).abs() < 0.03).all()
    assert torch.corrcoef(position.T)[0, 1].abs() < 0.06


def test_candidates_are_so_many_for_each_crop():
    assert CropSampler(num_crops=32, num_tries=7).num_candidates == 7 * 32
    # With a single try for each, not all negatives are found.
    few, many = (mask_crops(OBJECTS, num_tries=x)[1] for x in (1, 50))
    assert len(many) == 100 and 10 < len(few) < 60


def test_random_boxes_of_the_classifier_have_log_uniform_sides():
    crops, labels = classifier_crops([], num_crops=4000, positive_fraction=0.0)
    assert (labels == 3).all()
    sides = (crops[:, 2:] - crops[:, :2]) / torch.tensor([320.0, 240.0])
    logs = sides.log10()  # the least scale is .1
    for axis in logs.T:
        share = torch.histc(axis, bins=5, min=-1, max=0) / len(axis)
        assert ((share - 1 / 5).abs() < 0.03).all() and share.sum() == pytest.approx(1, abs=2e-3)
    assert torch.corrcoef(logs.T)[0, 1].abs() < 0.06


def test_crops_near_objects_are_displaced_and_of_other_sizes():
    box = [100, 80, 180, 140]
    # Of low similarity are only those that are far off in both.
    crops, labels = classifier_crops([box], num_crops=500, positive_fraction=1.0)
    assert (labels == 0).all() and len(crops) == 500
    sides = (crops[:, 2:] - crops[:, :2]) / torch.tensor([80.0, 60.0])
    shift = ((crops[:, 2:] + crops[:, :2]) / 2 - torch.tensor([140.0, 110.0])) / torch.tensor(
        [80.0, 60.0]
    )
    for values, least, most in ((shift, -0.2, 0.2), (sides.log2(), -0.5, 0.5)):
        assert (values >= least - 1e-4).all() and (values <= most + 1e-4).all()
        assert (values.amin(dim=0) < 0.8 * least).all() and (values.amax(dim=0) > 0.8 * most).all()
        assert (values.mean(dim=0).abs() < 0.15 * most).all()


def test_crops_around_objects_are_like_those_of_the_refinement():
    torch.manual_seed(0)
    sampler, crowd = CropSampler(num_crops=100), tensor([])
    settings = {"positive_coverage": 0.8, "object_fraction": 0.5, "enlargement": 1.2}
    crops, is_positive = sample_mask_crops(sampler, tensor(OBJECTS), crowd, SIZE, **settings)
    assert is_positive.sum() == 40 and (~is_positive).sum() == 60
    for crop in crops[is_positive].tolist():
        assert max(covered_part(crop, box) for box in OBJECTS) >= 0.8 - 1e-6
    # Random crops have the image's aspect ratio; about half of the positives do not.
    ratio = (crops[:, 2] - crops[:, 0]) / (crops[:, 3] - crops[:, 1])
    around = (ratio / (320 / 240)).log().abs() > 1e-3
    assert 5 <= around.sum() <= 20 and not around[~is_positive].any()
    # They are filled by their object more than random crops are.
    best = pairwise_iou(Boxes(crops), Boxes(tensor(OBJECTS))).amax(dim=1)
    assert best[around].mean() > best[is_positive & ~around].mean() + 0.1
    # As in the refinement, they may reach beyond the image.
    edge = sample_mask_crops(sampler, tensor([[0, 0, 320, 240]]), crowd, SIZE, **settings)[0]
    assert (edge[:, 0] < 0).any()


def test_no_objects_no_positives():
    crops, is_positive = mask_crops([])
    assert len(crops) == 60 and not is_positive.any()


def test_no_negatives_in_a_crowd():
    crops, is_positive = mask_crops(OBJECTS[:1], crowd=[[70, 0, 320, 240]])
    assert is_positive.sum() == 40 and len(crops) < 60
    assert (crops[~is_positive, 2] <= 70).all()
    assert len(mask_crops([], crowd=[[0, 0, 320, 240]])[0]) == 0


def test_a_crowded_image_gives_no_negatives():
    boxes = [[x, y, x + 30, y + 30] for x in range(0, 320, 40) for y in range(0, 240, 40)]
    crops, is_positive = mask_crops(boxes)
    assert is_positive.all() and len(crops) == 40


@pytest.mark.parametrize("sampling", [mask_crops, classifier_crops])
@pytest.mark.parametrize(
    "box, size",
    [
        ([5, 5, 6, 6], SIZE),
        ([-100, -50, 900, 900], SIZE),  # beyond the image on all sides
        ([10, 0, 11, 240], SIZE),
        ([0, 100, 320, 101], SIZE),
        ([400, 400, 500, 500], SIZE),  # outside
        ([20, 20, 20, 40], SIZE),  # empty
        ([0, 0, 1, 1], (1, 1)),
    ],
)
def test_strange_objects(sampling, box, size):
    crops, labels = sampling([box], size=size)
    assert crops.isfinite().all() and is_inside(crops, size) and len(crops) == len(labels)
    assert ((crops[:, 2:] - crops[:, :2]) > 0).all()


def test_an_object_that_fills_the_image_can_be_covered():
    # 80 % of what is visible of it.
    _, is_positive = mask_crops([[-100, -50, 900, 900]])
    assert is_positive.sum() == 40 and is_positive.all()


def test_classifier_crops_by_their_similarity():
    classes = torch.tensor([2, 1])
    crops, labels = classifier_crops(OBJECTS, classes)
    assert (labels < 3).sum() == 40 and (labels == 3).sum() == 60
    assert is_inside(crops)
    best, matched = pairwise_iou(Boxes(crops), Boxes(tensor(OBJECTS))).max(dim=1)
    is_positive = labels < 3
    assert (best[is_positive] >= 0.6).all() and (best[~is_positive] < 0.2).all()
    assert torch.equal(labels[is_positive], classes[matched[is_positive]])
    assert {1, 2} == set(labels[is_positive].tolist())
    # Negatives come from everywhere, also from beside the objects.
    assert 0.3 < (best[~is_positive] == 0).float().mean() < 0.6


def test_negatives_come_from_everywhere():
    # Also where many of those beside objects are negatives, too.
    torch.manual_seed(0)
    sampler = CropSampler(num_crops=100, min_scale=0.1)
    crops, labels = sample_classifier_crops(
        sampler, tensor(OBJECTS), torch.zeros(2).long(), tensor([]), SIZE, 3, (0.6, 0.7)
    )
    best = pairwise_iou(Boxes(crops[labels == 3]), Boxes(tensor(OBJECTS))).amax(dim=1)
    assert len(best) == 60 and (best > 0.45).any()
    assert 0.15 < (best == 0).float().mean() < 0.6


def test_classifier_crops_take_the_class_of_the_most_similar_object():
    # Nested objects with an IoU of .81: crops are similar to both.
    boxes, classes = [[0, 0, 200, 200], [0, 0, 180, 180]], torch.tensor([0, 1])
    crops, labels = classifier_crops(boxes, classes, num_crops=300)
    is_positive = labels < 3
    matched = pairwise_iou(Boxes(crops[is_positive]), Boxes(tensor(boxes))).argmax(dim=1)
    assert torch.equal(labels[is_positive], matched) and 0 < matched.sum() < len(matched)


def test_classifier_crops_without_objects_and_in_crowds():
    _, labels = classifier_crops([])
    assert len(labels) == 60 and (labels == 3).all()
    assert len(classifier_crops([], crowd=[[0, 0, 320, 240]])[0]) == 0


@pytest.mark.parametrize(
    "name, value",
    [("num_crops", 0), ("positive_fraction", 1.5), ("min_scale", 0.0), ("num_tries", 0)],
)
def test_settings_that_make_no_sense(name, value):
    with pytest.raises(ValueError, match=name.upper()):
        CropSampler(**{"num_crops": 10, name: value})
