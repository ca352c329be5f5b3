"""Crops and masks of each class: shared by all classes, or drawn for each by itself."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2proposals.data.mapper import CrowdRegions
from d2proposals.detectornet.box_masks import box_mask_targets, unknown_cells
from d2proposals.detectornet.crop_sampling import CropSampler, RefinementCrops
from d2proposals.detectornet.mask_training import sample_masks, sample_masks_of_each_class
from tests.common import make_images, make_instances
from tests.detectornet.test_generator import build_with_classes

SIZE = (120, 160)
CAT, DOG = [10, 10, 70, 60], [90, 40, 150, 110]


def make_objects(*boxes_and_classes, crowd=None):
    instances = make_instances(SIZE, [box for box, _ in boxes_and_classes])
    classes = [class_id for _, class_id in boxes_and_classes]
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if crowd is not None:
        regions = Boxes(torch.tensor([box for box, _ in crowd], dtype=torch.float32))
        crowd_classes = torch.tensor([class_id for _, class_id in crowd])
        instances.crowd_regions = CrowdRegions(regions, None, len(instances), crowd_classes)
    return instances


def sample(*instances, number=40, **kwargs):
    torch.manual_seed(0)
    settings = {"mask_size": 8, "positive_coverage": 0.8, "refinement": RefinementCrops(0.5, 1.2)}
    sampling = sample_masks if "num_classes" in kwargs else sample_masks_of_each_class
    sizes = [SIZE] * len(instances)
    return sampling(CropSampler(number), sizes, list(instances), **settings, **kwargs)


def covered(boxes, box):
    """The part of a box that each of some boxes (P, 4) covers."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    return (high - low).clamp(min=0).prod(dim=1) / (box[2:] - box[:2]).prod()


def test_each_class_has_crops_of_its_own():
    samples = sample(make_objects((CAT, 2), (DOG, 0)), make_objects((DOG, 2)), make_objects())
    # 16 positives and 24 negatives of each image and class, for both of three classes.
    assert samples.classes.tolist() == [0] * 120 + [2] * 120
    assert samples.gt_masks.shape == (240, 1, 5, 8, 8) and samples.num_positives == 2 * 48
    objects = {(0, 0): [DOG], (0, 2): [CAT], (1, 2): [DOG]}
    found = set()
    for image in range(3):
        for class_id in (0, 2):
            chosen = (samples.image_index == image) & (samples.classes == class_id)
            crops = samples.crops[chosen]
            boxes = torch.tensor(objects.get((image, class_id), [])).float().reshape(-1, 4)
            masks = box_mask_targets(boxes, torch.zeros(len(boxes)).long(), crops, 1, 8)
            assert torch.equal(samples.gt_masks[chosen], masks)
            if len(boxes) == 0:
                assert masks.sum() == 0 and len(crops) > 0  # negatives, whatever else is there
                found.update({(image, class_id)} if len(crops) else set())
                continue
            part = covered(crops, boxes[0])
            assert ((part >= 0.8 - 1e-5) | (part == 0)).all() and (part > 0).any()
    # Negatives of class 0 may hold the cat.
    no_dog = samples.crops[(samples.classes == 0) & (samples.image_index == 0)]
    no_dog = no_dog[covered(no_dog, torch.tensor(DOG).float()) == 0]
    assert (covered(no_dog, torch.tensor(CAT).float()) > 0).any()


def test_shared_crops_touch_no_object_of_any_class_where_they_are_negative():
    samples = sample(make_objects((CAT, 2), (DOG, 0)), num_classes=3)
    assert samples.classes is None and samples.gt_masks.shape[1] == 3
    masks = samples.gt_masks.sum(dim=(1, 2, 3, 4))
    assert (masks == 0).sum() == 24 and samples.num_positives == 16


def test_a_class_that_is_in_no_image_has_no_crops_and_no_class_none_at_all():
    samples = sample(make_objects((CAT, 1)), make_objects())
    assert set(samples.classes.tolist()) == {1}
    samples = sample(make_objects(), make_objects())
    assert len(samples.crops) == len(samples.classes) == 0
    assert samples.gt_masks.shape == (0, 1, 5, 8, 8) and samples.is_unknown.dtype == torch.bool


def test_a_crowd_says_nothing_of_its_own_class_alone():
    masks, crops = torch.zeros(1, 3, 5, 4, 4), torch.tensor([[0.0, 0, 40, 40]])
    crowd = torch.tensor([[0.0, 0, 20, 15], [30, 0, 40, 40]])
    left, right = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    left[:2, :2], right[:, 3] = True, True
    found = unknown_cells(masks, crowd, crops, torch.tensor([0, 2]))
    assert found.shape == (1, 3, 1, 4, 4)
    assert torch.equal(found[0, 0, 0], left) and torch.equal(found[0, 2, 0], right)
    assert not found[0, 1].any()
    assert torch.equal(unknown_cells(masks, crowd, crops)[0, 1, 0], left | right)
    # An object's cells are known.
    masks[0, 2, 0, :2, 3] = 0.5
    right[:2] = False
    found = unknown_cells(masks, crowd, crops, torch.tensor([0, 2]))
    assert torch.equal(found[0, 2, 0], right) and torch.equal(found[0, 0, 0], left)


def test_negatives_of_a_class_may_lie_in_another_class_s_crowd():
    left = [0, 0, 80, 120]
    image = make_objects((DOG, 0), (DOG, 1), crowd=[(left, 1)])
    samples = sample(image, number=100)
    for class_id, reaches_left in ((0, True), (1, False)):
        crops = samples.crops[(samples.classes == class_id)]
        negatives = crops[covered(crops, torch.tensor(DOG).float()) == 0]
        in_crowd = covered(negatives, torch.tensor(left).float()) > 0
        assert in_crowd.any() == reaches_left
        unknown = samples.is_unknown[samples.classes == class_id]
        assert unknown.any() == (not reaches_left)
    # Crops for all classes at once: no negative there, and unknown is class 1 alone.
    samples = sample(image, number=100, num_classes=3)
    negatives = samples.crops[samples.gt_masks.sum(dim=(1, 2, 3, 4)) == 0]
    assert (covered(negatives, torch.tensor(left).float()) == 0).all()
    assert samples.is_unknown.sum(dim=(0, 2, 3, 4)).ne(0).tolist() == [False, True, False]


def test_networks_of_each_class_are_trained_on_its_crops():
    generator = build_with_classes("MODEL.DETECTORNET.NETWORKS", "per_class_and_mask").train()
    seen, number = [], 5
    for index, network in enumerate(generator.network.networks):
        network.register_forward_pre_hook(
            lambda _, x, index=index: seen.append((index // number, len(x[0])))
        )
    images = make_images(SIZE)
    with EventStorage() as storage:
        _, losses = generator(images, {}, [make_objects((CAT, 2), (DOG, 0))])
        counts = {k: v[0] for k, v in storage.latest().items()}
    assert sorted(set(seen)) == [(0, 32), (1, 0), (2, 32)] and len(seen) == 15
    assert counts == {"detectornet/num_pos_crops": 26, "detectornet/num_neg_crops": 38}
    losses["loss_detectornet_mask"].backward()
    assert all(p.grad is not None for p in generator.parameters())


@pytest.mark.parametrize("networks", ["shared", "per_class_and_mask"])
def test_a_class_beyond_the_number_of_classes_is_named(networks):
    generator = build_with_classes("MODEL.DETECTORNET.NETWORKS", networks)
    with (
        EventStorage(),
        pytest.raises(ValueError, match="has class 3.*NUM_CLASSES 3 leaves 0 to 2"),
    ):
        generator.train()(make_images(SIZE), {}, [make_objects((CAT, 0), (DOG, 3))])
