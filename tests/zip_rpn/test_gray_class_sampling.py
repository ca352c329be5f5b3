import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from d2proposals.zip_rpn import gray_class_sampling
from d2proposals.zip_rpn.gray_class_sampling import (
    GRAY,
    IGNORED,
    NEGATIVE,
    POSITIVE,
    EquilibriumSampler,
    GrayClassLabeler,
    match_anchors,
)


def boxes_with_iou(*ious: float) -> Boxes:
    """Boxes inside the square (0, 0, 100, 100) whose IoU with it is as given."""
    return Boxes(torch.tensor([[0, 0, 100, 100 * iou] for iou in ious], dtype=torch.float32))


SQUARE = Boxes(torch.tensor([[0.0, 0.0, 100.0, 100.0]]))
NOTHING = Boxes(torch.zeros(0, 4))


def all_valid(anchors):
    return torch.ones(len(anchors), dtype=torch.bool)


def test_labels_by_iou_band():
    ious = (0.0, 0.2, 0.24, 0.26, 0.34, 0.36, 0.5, 0.54, 0.56, 0.59, 0.61, 1.0)
    anchors = boxes_with_iou(*ious)
    labels, index = GrayClassLabeler()(anchors, SQUARE, all_valid(anchors))
    n, g, p, i = NEGATIVE, GRAY, POSITIVE, IGNORED
    assert labels.tolist() == [n, n, n, i, i, g, g, g, i, i, p, p]
    assert (index == 0).all()


def test_labels_at_the_edges_of_the_bands():
    # Exact in binary.
    labeler = GrayClassLabeler(positive_iou=0.75, negative_iou=0.25, gray_iou=(0.375, 0.5))
    anchors = boxes_with_iou(0.25, 0.375, 0.5, 0.75)
    labels, _ = labeler(anchors, SQUARE, all_valid(anchors))
    assert labels.tolist() == [IGNORED, GRAY, GRAY, POSITIVE]


def test_labels_in_two_class_mode_and_with_a_lower_bound_on_negatives():
    anchors = boxes_with_iou(0.0, 0.05, 0.2, 0.4, 0.7)
    labels, _ = GrayClassLabeler(gray_iou=None)(anchors, SQUARE, all_valid(anchors))
    assert labels.tolist() == [NEGATIVE, NEGATIVE, NEGATIVE, IGNORED, POSITIVE]
    labeler = GrayClassLabeler(gray_iou=None, negative_iou_min=0.1)
    assert labeler(anchors, SQUARE, all_valid(anchors))[0].tolist()[:3] == [-1, -1, NEGATIVE]


def test_low_quality_match_takes_the_best_anchors_of_each_object_inside_the_image():
    anchors = boxes_with_iou(0.1, 0.3, 0.3, 0.2)
    labeler = GrayClassLabeler(low_quality_match=True)
    labels, _ = labeler(anchors, SQUARE, all_valid(anchors))
    assert labels.tolist() == [NEGATIVE, POSITIVE, POSITIVE, NEGATIVE]
    labels, _ = labeler(anchors, SQUARE, torch.tensor([True, False, False, True]))
    assert labels.tolist() == [NEGATIVE, IGNORED, IGNORED, POSITIVE]
    far = Boxes(torch.tensor([[500.0, 500.0, 510.0, 510.0]]))
    labels, _ = labeler(anchors, far, all_valid(anchors))
    assert (labels == NEGATIVE).all()  # an object that no anchor touches has no best anchor


def test_no_objects_makes_all_anchors_negative():
    anchors = boxes_with_iou(0.1, 0.9)
    labels, index = GrayClassLabeler(low_quality_match=True)(anchors, NOTHING, all_valid(anchors))
    assert labels.tolist() == [NEGATIVE, NEGATIVE] and index.tolist() == [0, 0]


@pytest.mark.parametrize("num_objects", [1, 2, 37])
def test_match_anchors_in_parts_equals_detectron2s_matcher(num_objects, monkeypatch):
    torch.manual_seed(num_objects)
    corner = torch.rand(500, 2) * 80
    anchors = Boxes(torch.cat([corner, corner + 1 + torch.rand(500, 2) * 60], 1))
    objects = Boxes(anchors.tensor[torch.randperm(500)[:num_objects]] + torch.rand(num_objects, 4))
    monkeypatch.setattr(gray_class_sampling, "MAX_IOU_ELEMENTS", 500 * 4)  # four objects a part
    iou, index, is_best = match_anchors(anchors, objects, all_valid(anchors))
    matcher = Matcher([0.6], [0, 1], allow_low_quality_matches=True)
    expected_index, expected_label = matcher(pairwise_iou(objects, anchors))
    assert torch.equal(index, expected_index)
    assert torch.equal(((iou >= 0.6) | is_best).long(), expected_label.long())


@pytest.mark.parametrize(
    "settings",
    [
        {"negative_iou": 0.4},
        {"gray_iou": (0.5, 0.7)},
        {"negative_iou_min": 0.3},
        {"gray_iou": (0.55, 0.35)},
    ],
)
def test_overlapping_bands_are_named(settings):
    with pytest.raises(ValueError, match="IoU bands overlap"):
        GrayClassLabeler(**settings)


def quotas_twin(sampler, positive, negative, gray):
    """Sec. 3.3 and 5.1 in plain Python, with each class in what the earlier ones left."""
    batch, cap = sampler.batch_size, sampler.batch_size_per_class
    p = min(positive, cap, batch)
    if sampler.equilibrium:
        most = (
            int(p * sampler.negative_ratio) if p else int(batch * sampler.share_without_positives)
        )
        n = min(negative, most, cap, batch - p)
        return p, n, min(gray, int((p + n) * sampler.gray_ratio), cap, batch - p - n)
    share = sampler.gray_ratio / (1 + sampler.gray_ratio)
    g = min(gray, int(batch * share), cap, batch - p)
    return p, min(negative, batch - p - g), g


@pytest.mark.parametrize("batch_size, cap", [(300, 100), (100, 100), (60, 100), (256, 128)])
@pytest.mark.parametrize("equilibrium", [True, False])
@pytest.mark.parametrize("gray_ratio", [0.5, 0.0, 1.0])
def test_sampled_counts_equal_the_rules(batch_size, cap, equilibrium, gray_ratio):
    sampler = EquilibriumSampler(
        batch_size=batch_size,
        batch_size_per_class=cap,
        equilibrium=equilibrium,
        gray_ratio=gray_ratio,
    )
    counts = [
        (0, 0, 0), (0, 5000, 0), (0, 5000, 40), (1, 5000, 40), (3, 2, 40), (30, 5000, 10),
        (100, 5000, 500), (400, 5000, 500), (400, 0, 500), (0, 0, 500), (50, 5000, 500),
        (500, 500, 500), (20, 5000, 500), (90, 5, 500),
    ]  # fmt: skip
    labels = torch.full((len(counts), 6000), IGNORED)
    for row, (p, n, g) in zip(labels, counts, strict=True):
        row[:p], row[p : p + n], row[p + n : p + n + g] = POSITIVE, NEGATIVE, GRAY
    labels = labels[:, torch.randperm(6000)]
    sampled = sampler(labels)
    assert (labels == sampled)[sampled != IGNORED].all()
    for row, count in zip(sampled, counts, strict=True):
        drawn = tuple(int((row == c).sum()) for c in (POSITIVE, NEGATIVE, GRAY))
        assert drawn == quotas_twin(sampler, *count)
        assert sum(drawn) <= batch_size
    for quota in sampler.quotas(*torch.tensor(counts).unbind(dim=1)):
        assert (quota >= 0).all()


@pytest.mark.parametrize(
    "batch_size, cap, equilibrium, expected",
    [
        (300, 100, True, (100, 100, 100)),
        (300, 100, False, (100, 100, 100)),
        (100, 100, True, (100, 0, 0)),
        (100, 100, False, (100, 0, 0)),
        (60, 100, True, (60, 0, 0)),
        (60, 100, False, (60, 0, 0)),
        (256, 128, True, (128, 128, 0)),
        # A third of 256 are gray, half of the others; negatives fill the batch.
        (256, 128, False, (128, 43, 85)),
    ],
)
def test_quotas_of_500_anchors_of_each_class_by_hand(batch_size, cap, equilibrium, expected):
    sampler = EquilibriumSampler(
        batch_size=batch_size, batch_size_per_class=cap, equilibrium=equilibrium
    )
    quotas = sampler.quotas(*torch.full((3, 1), 500))
    assert tuple(quota.item() for quota in quotas) == expected


def test_sampling_is_uniform_and_needs_fewer_anchors_than_the_batch():
    labels = torch.full((1, 20), NEGATIVE)
    sampler = EquilibriumSampler(batch_size=8, batch_size_per_class=8, share_without_positives=0.5)
    torch.manual_seed(0)
    drawn = torch.stack([sampler(labels)[0] == NEGATIVE for _ in range(2000)]).float()
    assert (drawn.sum(dim=1) == 4).all()
    # Each anchor is drawn with probability .2; 2,000 draws have a standard deviation of .009.
    assert (drawn.mean(dim=0) - 0.2).abs().max() < 0.04
    assert sampler(labels[:, :3]).ne(IGNORED).sum() == 3
