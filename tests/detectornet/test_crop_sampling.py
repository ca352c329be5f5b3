"""Crops of Sec. 6: the rules for positives and negatives, their numbers, hopeless images."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from d2proposals.detectornet.crop_sampling import (
    CropSampler,
    RefinementCrops,
    sample_classifier_crops,
    sample_mask_crops,
)

SIZE = (240, 320)
OBJECTS = [[20, 30, 60, 50], [200, 100, 310, 230]]


def tensor(boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def mask_crops(boxes, crowd=(), size=SIZE, fraction=0.0, **settings):
    """Crops of a single image, and whether each is positive."""
    torch.manual_seed(0)
    sampler = CropSampler(**{"num_crops": 100, "min_scale": 0.25, **settings})
    refinement = RefinementCrops(fraction, 1.2)
    crops = sample_mask_crops(sampler, [tensor(boxes)], [tensor(crowd)], [size], 0.8, refinement)
    assert (crops.image_index == 0).all() and set(crops.labels.tolist()) <= {0, 1}
    return crops.boxes, crops.labels > 0


def classifier_crops(boxes, classes=None, crowd=(), size=SIZE, **settings):
    torch.manual_seed(0)
    sampler = CropSampler(**{"num_crops": 100, "min_scale": 0.1, **settings})
    classes = torch.zeros(len(boxes), dtype=torch.int64) if classes is None else classes
    crops = sample_classifier_crops(sampler, [tensor(boxes)], [classes], [tensor(crowd)], [size], 3)
    assert (crops.image_index == 0).all()
    return crops.boxes, crops.labels


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


def shape_of(crops):
    sides = crops[:, 2:] - crops[:, :2]
    return sides[:, 0] / sides[:, 1], sides.prod(dim=1)


def test_crops_like_those_of_the_refinement():
    crops, is_positive = mask_crops(OBJECTS, fraction=0.5)
    assert is_positive.sum() == 40 and (~is_positive).sum() == 60
    for crop, positive in zip(crops.tolist(), is_positive.tolist(), strict=True):
        covered = [covered_part(crop, box) for box in OBJECTS]
        assert max(covered) >= 0.8 - 1e-6 if positive else max(covered) == 0
    # Random crops have the image's aspect ratio; half of the positives and negatives do not.
    ratio, area = shape_of(crops)
    is_like = (ratio / (320 / 240)).log().abs() > 1e-3
    assert is_like[is_positive].sum() == 20 and is_like[~is_positive].sum() == 30
    # Displaced by at most .2 of the sides, of .7 to 1.4 times the sides, times 1.2.
    around = crops[is_positive & is_like]
    best, matched = pairwise_iou(Boxes(around), Boxes(tensor(OBJECTS))).max(dim=1)
    objects = tensor(OBJECTS)[matched]
    factor = (around[:, 2:] - around[:, :2]) / (objects[:, 2:] - objects[:, :2])
    assert (factor > 1.2 * 2**-0.5 - 1e-3).all() and (factor < 1.2 * 2**0.5 + 1e-3).all()
    assert best.mean() > 0.45 and len(set(matched.tolist())) == 2
    # As in the refinement, they may reach beyond the image.
    crops, is_positive = mask_crops([[0, 0, 320, 240]], fraction=0.5)
    assert (crops[is_positive, 0] < 0).any()


def test_neither_size_nor_aspect_ratio_tells_what_is_in_a_crop_like_the_refinement_s():
    # A small wide object: nothing else makes small wide crops.
    crops, is_positive = mask_crops([[100, 100, 140, 110]], fraction=1.0, num_crops=1000)
    (ratio, area), number = shape_of(crops), 400
    assert is_positive.sum() == number and len(crops) == 1000
    for values in (ratio.log(), area.log()):
        positive, negative = values[is_positive], values[~is_positive]
        # All shapes occur with both labels, and with about the same mean.
        assert (positive.mean() - negative.mean()).abs() < 0.3 * values.std()
        assert negative.amin() < positive.quantile(0.1) and negative.amax() > positive.quantile(0.9)
    # They lie everywhere, not beside the object.
    center = (crops[~is_positive, :2] + crops[~is_positive, 2:]) / 2 / torch.tensor([320.0, 240.0])
    assert (center.mean(dim=0) - 0.5).abs().max() < 0.05 and (center.std(dim=0) > 0.2).all()


def crops_of_batch(*boxes, crowd=None, fraction=0.0, sizes=None, **settings):
    torch.manual_seed(0)
    crowd, sizes = crowd or [[]] * len(boxes), sizes or [SIZE] * len(boxes)
    sampler = CropSampler(**{"num_crops": 20, "min_scale": 0.25, **settings})
    return sample_mask_crops(
        sampler, [tensor(x) for x in boxes], [tensor(x) for x in crowd], sizes, 0.8,
        RefinementCrops(fraction, 1.2),
    )  # fmt: skip


def numbers_of(crops, num_images):
    return [
        [int(((crops.image_index == i) & (crops.labels == label)).sum()) for label in (1, 0)]
        for i in range(num_images)
    ]


CROWDED = [[x, y, x + 30, y + 30] for x in range(0, 320, 40) for y in range(0, 240, 40)]


def test_other_images_make_up_for_what_an_image_lacks():
    # 8 positives and 12 negatives of each; the crowded image has no negative, the empty one no
    # positive, and the last one has both.
    crops = crops_of_batch(CROWDED, [], OBJECTS)
    assert numbers_of(crops, 3) == [[12, 0], [0, 18], [12, 18]]
    # Image by image, positives first; each by the rule of its own image.
    assert (crops.image_index.diff() >= 0).all()
    for image, boxes in enumerate((CROWDED, [], OBJECTS)):
        labels = crops.labels[crops.image_index == image]
        assert (labels.diff() <= 0).all()
        for crop, label in zip(crops.boxes[crops.image_index == image].tolist(), labels.tolist(),
                               strict=True):  # fmt: skip
            covered = [covered_part(crop, box) for box in boxes]
            assert max(covered) >= 0.8 - 1e-6 if label else max(covered, default=0) == 0
    # A crowd is no place for negatives either; an image alone gives what it has.
    everywhere = [[0, 0, 320, 240]]
    crops = crops_of_batch([], [], crowd=[everywhere, []])
    assert numbers_of(crops, 2) == [[0, 0], [0, 24]]
    assert numbers_of(crops_of_batch(CROWDED), 1) == [[8, 0]]


def test_images_without_objects_have_negatives_of_the_batch_s_shapes():
    crops = crops_of_batch([], [[0, 0, 160, 12]], sizes=[(240, 320), (120, 160)], fraction=1.0,
                           positive_fraction=0.0)  # fmt: skip
    ratio, _ = shape_of(crops.boxes)
    # As wide as that image, and a tenth of its height: 320 x 24 in an image of twice the size.
    assert (ratio[crops.image_index == 0] > 6).all() and (crops.image_index == 0).sum() == 20


def test_hard_negatives_are_drawn_first():
    torch.manual_seed(0)
    sampler = CropSampler(num_crops=20)
    hard = [[100, 10, 130, 40], [10, 150, 60, 200], [21, 31, 60, 50], [100, 0, 400, 60]]

    def negatives(fraction, crowd=()):
        crops = sample_classifier_crops(
            sampler, [tensor(OBJECTS)], [torch.zeros(2).long()], [tensor(crowd)], [SIZE], 3,
            (0.2, 0.6), [tensor(hard)], fraction,
        )  # fmt: skip
        assert (crops.labels < 3).sum() == 8
        return crops.boxes[crops.labels == 3].tolist()

    # The third one is an object; the last one is clipped to the image.
    expected = [hard[0], hard[1], [100, 0, 320, 60]]
    found = negatives(0.5)
    assert len(found) == 12 and [x in found for x in expected] == [True] * 3
    assert sorted(negatives(1.0)[:3]) == sorted(expected)
    assert not any(x in negatives(0.0) for x in expected)
    # Half of them at most: with 1/6, two of twelve.
    assert sum(x in expected for x in negatives(1 / 6)) == 2
    assert hard[0] not in negatives(1.0, crowd=[[90, 0, 140, 50]])


def test_which_hard_negatives_are_drawn_is_left_to_chance():
    hard = [[100 + 20 * i, 10, 118 + 20 * i, 40] for i in range(8)]
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        crops = sample_classifier_crops(
            CropSampler(num_crops=10), [tensor(OBJECTS)], [torch.zeros(2).long()], [tensor([])],
            [SIZE], 3, (0.2, 0.6), [tensor(hard)], 1 / 6,
        )  # fmt: skip
        found = crops.boxes[crops.labels == 3].tolist()
        drawn |= {hard.index(box) for box in found if box in hard}
    assert len(drawn) == 8


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
    crops, _, labels = sample_classifier_crops(
        sampler, [tensor(OBJECTS)], [torch.zeros(2).long()], [tensor([])], [SIZE], 3, (0.6, 0.7)
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
