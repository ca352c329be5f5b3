"""What the mask network is trained on, its loss, and proposals for a detector that trains."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from d2proposals.data.mapper import CrowdRegions
from d2proposals.detectornet.box_masks import box_mask_targets
from d2proposals.proposals.patches import crop_patches
from tests.common import make_images, make_instances
from tests.detectornet.test_generator import ALL_BOXES, build, build_with_classes

PROPOSING = ["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True, *ALL_BOXES,
             "MODEL.DETECTORNET.STRIDE", 20.0]  # fmt: skip
SIZE = (120, 160)
BOX = [10, 10, 60, 60]


def train(generator, images, instances):
    generator.train()
    with EventStorage() as storage:
        proposals, losses = generator(images, {}, instances)
        return proposals, losses, {k: v[0] for k, v in storage.latest().items()}


def test_crops_are_cut_where_their_masks_are_made():
    generator, seen = build(), {}
    images = make_images((120, 160), (97, 251))
    instances = [make_instances(s, [[10, 10, 60, 60]]) for s in images.image_sizes]
    with EventStorage():
        torch.manual_seed(3)
        samples = generator.label_and_sample_crops(images.image_sizes, instances)
    patches = crop_patches(images, samples.crops, samples.image_index, (225, 225))
    generator.network.register_forward_pre_hook(lambda _, x: seen.update(patches=x[0]))
    torch.manual_seed(3)
    _, losses, counts = train(generator, images, instances)
    assert torch.equal(seen["patches"], patches)
    assert counts["detectornet/num_pos_crops"] == 26  # 40 % of 32, for two images
    assert counts["detectornet/num_neg_crops"] == 38
    # Untrained outputs are about 0: the loss is about the mean of (m + lambda) m^2.
    expected = ((samples.gt_masks + 0.1) * samples.gt_masks**2).mean()
    assert losses["loss_detectornet_mask"].item() == pytest.approx(expected.item(), rel=0.1)


def test_all_crowd_and_no_crops_at_all():
    generator = build()
    images = make_images((120, 160))
    instances = make_instances((120, 160))
    instances.crowd_regions = CrowdRegions(Boxes(torch.tensor([[0.0, 0, 160, 120]])), None, 0)
    _, losses, counts = train(generator, images, [instances])
    assert counts == {"detectornet/num_pos_crops": 0, "detectornet/num_neg_crops": 0}
    assert losses["loss_detectornet_mask"] == 0
    losses["loss_detectornet_mask"].backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_proposals_in_training_only_where_they_are_wanted():
    images, instances = make_images((120, 160)), [make_instances((120, 160), [[10, 10, 60, 60]])]
    wanted = ["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True, *ALL_BOXES]
    (proposals,), _, _ = train(build(*wanted), images, instances)
    assert len(proposals) == 15
    assert set(proposals.get_fields()) == {"proposal_boxes", "objectness_logits"}
    # The paper's heads train on crops of their own.
    heads = ["MODEL.ROI_HEADS.NAME", "DetectorNetHeads"]
    (proposals,), _, _ = train(build(*wanted, *heads), images, instances)
    assert len(proposals) == 0


def sample(generator, instances):
    torch.manual_seed(0)
    with EventStorage():
        return generator.label_and_sample_crops([SIZE] * len(instances), instances)


def make_objects(boxes, classes):
    instances = make_instances(SIZE, boxes)
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def test_class_agnostic_masks_are_of_all_classes():
    samples = sample(build(), [make_objects([BOX, [80, 30, 150, 110]], [7, 3])])
    boxes = torch.tensor([BOX, [80, 30, 150, 110]]).float()
    expected = box_mask_targets(boxes, torch.zeros(2).long(), samples.crops, 1, 24)
    assert torch.equal(samples.gt_masks, expected) and expected.sum() > 0


def test_each_class_has_masks_of_its_own():
    boxes = torch.tensor([BOX, [80, 30, 150, 110]]).float()
    samples = sample(build_with_classes(), [make_objects(boxes.tolist(), [0, 2])])
    assert samples.gt_masks.shape == (len(samples.crops), 3, 5, 24, 24)
    for class_id, box in ((0, boxes[:1]), (2, boxes[1:])):
        expected = box_mask_targets(box, torch.zeros(1).long(), samples.crops, 1, 24)[:, 0]
        assert torch.equal(samples.gt_masks[:, class_id], expected) and expected.sum() > 0
    assert samples.gt_masks[:, 1].sum() == 0


def test_settings_of_the_sampling_reach_it():
    around = ["MODEL.DETECTORNET.OBJECT_FRACTION", 1.0, "MODEL.DETECTORNET.NUM_CROPS", 200]

    def positives(*overrides):
        samples = sample(build(*around, *overrides), [make_instances(SIZE, [[60, 40, 100, 80]])])
        # The first 80 crops are positive, most of them drawn around the object.
        sides = samples.crops[:80, 2:] - samples.crops[:80, :2]
        is_around = (sides[:, 0] / sides[:, 1] / (160 / 120)).log().abs() > 1e-3
        covered = samples.gt_masks[:80, 0, 0].mean(dim=(1, 2)) * sides.prod(dim=1) / 1600
        return sides[is_around].mean(), covered[is_around].min()

    side, covered = positives("MODEL.DETECTORNET.REFINEMENT.ENLARGEMENT", 1.2)
    larger, _ = positives("MODEL.DETECTORNET.REFINEMENT.ENLARGEMENT", 2.4)
    assert 40 < side < 75 and larger > 1.5 * side
    assert 0.8 - 1e-3 <= covered < 0.9
    _, covered = positives("MODEL.DETECTORNET.POSITIVE_COVERAGE", 0.5)
    assert 0.5 - 1e-3 <= covered < 0.7


def test_the_weight_of_the_loss():
    losses = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        generator = build("MODEL.DETECTORNET.LOSS_WEIGHT", weight)
        torch.manual_seed(1)
        _, loss, _ = train(generator, make_images(SIZE), [make_instances(SIZE, [BOX])])
        losses.append(loss["loss_detectornet_mask"].item())
    assert losses[1] == pytest.approx(3 * losses[0]) and losses[0] > 0


def test_cells_in_a_crowd_count_only_where_an_object_is():
    generator = build("MODEL.DETECTORNET.MASK_SIZE", 4, "MODEL.DETECTORNET.NUM_CROPS", 100)
    instances = make_objects([[40, 30, 80, 60]], [0])
    crowd = torch.tensor([[60.0, 30, 160, 90]])
    instances.crowd_regions = CrowdRegions(Boxes(crowd), None, 1)
    samples = sample(generator, [instances, make_objects([], [])])
    full = samples.gt_masks[:, :, :1]
    crowd_covers = box_mask_targets(crowd, torch.zeros(1).long(), samples.crops, 1, 4)[:, :, :1] > 0
    in_first = (samples.image_index == 0)[:, None, None, None, None]
    assert torch.equal(samples.is_unknown, crowd_covers & (full == 0) & in_first)
    assert 0.05 < samples.is_unknown.float().mean() < 0.5
    # Nothing in these cells reaches the loss: neither it nor a gradient; elsewhere it is a mean.
    pred = torch.rand_like(samples.gt_masks).requires_grad_()
    (loss,) = generator.losses(pred, samples.gt_masks, samples.is_unknown).values()
    loss.backward()
    is_known = ~samples.is_unknown.expand_as(pred)
    assert (pred.grad[~is_known] == 0).all() and (pred.grad[is_known] != 0).all()
    gt, pred = samples.gt_masks[is_known], pred.detach()[is_known]
    assert loss.item() == pytest.approx(((gt + 0.1) * (pred - gt) ** 2).mean().item())
    # And that is the loss of training.
    torch.manual_seed(0)
    _, losses, _ = train(generator, make_images(SIZE), [instances])
    torch.manual_seed(0)
    with EventStorage():
        samples = generator.label_and_sample_crops([SIZE], [instances])
    is_known = ~samples.is_unknown.expand_as(samples.gt_masks)
    gt = samples.gt_masks[is_known]  # outputs of an untrained network are about 0
    expected = ((gt + 0.1) * gt**2).mean().item()
    assert losses["loss_detectornet_mask"].item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("settings", [
    ("MODEL.DETECTORNET.DROPOUT", 0.5),
    ("MODEL.DETECTORNET.DROPOUT", 0.0, "MODEL.DETECTORNET.NORM", "BN"),
])  # fmt: skip
def test_proposals_in_training_are_those_of_evaluation(settings):
    generator, images = build(*PROPOSING, *settings), make_images(SIZE, (97, 131))
    for network in generator.network.networks:
        nn.init.normal_(network.output.weight, std=0.3)
    expected = generator.predict_proposals(images)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    found = generator.train().predict_proposals(images)
    for found_i, expected_i in zip(found, expected, strict=True):
        assert len(found_i) > 5
        assert torch.equal(found_i.proposal_boxes.tensor, expected_i.proposal_boxes.tensor)
        assert torch.equal(found_i.objectness_logits, expected_i.objectness_logits)
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(module.training for module in generator.modules())


def test_the_mode_comes_back_after_an_exception():
    generator = build(*PROPOSING).train()
    kept = generator.network.networks[0].trunk.features.eval()

    def fail(*args):
        assert not any(module.training for module in generator.network.modules())
        raise RuntimeError("no memory")

    generator._regress = fail
    with pytest.raises(RuntimeError, match="no memory"):
        generator.predict_proposals(make_images(SIZE))
    in_evaluation = {module for module in generator.modules() if not module.training}
    assert in_evaluation == set(kept.modules())


def test_proposals_in_training_need_no_gradient():
    generator = build(*PROPOSING)
    (proposals,), losses, _ = train(generator, make_images(SIZE), [make_instances(SIZE, [BOX])])
    assert len(proposals) > 5
    assert not proposals.proposal_boxes.tensor.requires_grad
    assert not proposals.objectness_logits.requires_grad
    assert losses["loss_detectornet_mask"].requires_grad
