"""Algorithm 1 as a whole: training targets, both stages with perfect masks, batches, edges."""

import pytest
import torch
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.data.mapper import CrowdRegions
from d2proposals.detectornet.box_masks import box_mask_targets
from d2proposals.detectornet.crop_sampling import enlarge_boxes
from d2proposals.detectornet.detection import SearchGrid, best_boxes
from d2proposals.proposals.patches import crop_patches
from tests.common import make_cfg, make_images, make_instances

SMALL = ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.03, "MODEL.DETECTORNET.NETWORKS", "shared"]
ALL_BOXES = ["MODEL.DETECTORNET.SCORE_THRESH", -1.0]


def build(*overrides):
    torch.manual_seed(0)
    cfg = make_cfg("detectornet_rpn_only.yaml", *SMALL, *overrides)
    return build_proposal_generator(cfg, {}).eval()


class PerfectNetwork:
    """Stands in for crops and network: the masks of given boxes."""

    def __init__(self, boxes, classes=None, num_classes=1):
        self.boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        self.classes = torch.zeros(len(self.boxes)) if classes is None else torch.tensor(classes)
        self.num_classes = num_classes
        self.crops = []

    def __call__(self, images, crops, index):
        self.crops.append(crops)
        return box_mask_targets(self.boxes, self.classes.long(), crops, self.num_classes, 24)


def propose(generator, boxes, size=(480, 640), **kwargs):
    """Proposals for perfect masks of boxes."""
    generator._regress = PerfectNetwork(boxes, **kwargs)
    images = ImageList(torch.zeros(1, 3, *size), [size])
    (proposals,), losses = generator(images, {})
    assert losses == {}
    return proposals


def best_iou(proposals, boxes):
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return pairwise_iou(boxes, proposals.proposal_boxes)


OBJECTS = [[40, 60, 150, 190], [300, 80, 560, 330], [180, 330, 260, 460]]


def test_windows_scales_and_refinement_of_algorithm_1():
    generator = build()
    proposals = propose(generator, OBJECTS)
    windows, refinement = generator._regress.crops[:3], generator._regress.crops[3:]
    assert [len(x) for x in windows] == [1, 9, 25]
    # The best five of each scale, each enlarged by 1.2.
    assert sum(len(x) for x in refinement) == 15 and len(proposals) == 15
    first_stage = build("MODEL.DETECTORNET.REFINEMENT.ENABLED", False)
    detections = propose(first_stage, OBJECTS).proposal_boxes.tensor
    crops = torch.cat(refinement)
    sides = (crops[:, 2:] - crops[:, :2]) / 1.2
    center = (crops[:, 2:] + crops[:, :2]) / 2
    unenlarged = torch.cat([center - sides / 2, center + sides / 2], dim=1)
    order, expected = (x[:, 0].argsort() for x in (unenlarged, detections))
    torch.testing.assert_close(
        unenlarged[order].sort(dim=0).values, detections[expected].sort(dim=0).values
    )
    assert first_stage._regress.crops[-1].shape == (25, 4)


def test_every_object_is_found_and_refined():
    before = propose(build("MODEL.DETECTORNET.REFINEMENT.ENABLED", False), OBJECTS)
    after = propose(build(), OBJECTS)
    before, after = (best_iou(x, OBJECTS).amax(dim=1) for x in (before, after))
    assert (before > 0.7).all()
    assert after.mean() > before.mean() + 0.03 and (after > 0.85).all()


@pytest.mark.parametrize("ring_weight, least_iou", [(1.0, 0.75), (2.0, 0.85)])
def test_refinement_of_arbitrary_boxes(ring_weight, least_iou):
    # The best proposal by its score, not the closest one.
    generator = build("MODEL.DETECTORNET.RING_WEIGHT", ring_weight)
    images = ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)])
    random = torch.Generator().manual_seed(1)
    first, refined = [], []
    for _ in range(12):
        w, h = (60 + 200 * torch.rand(2, generator=random)).tolist()
        x, y = (torch.rand(2, generator=random) * torch.tensor([640 - w, 480 - h])).tolist()
        generator._regress = PerfectNetwork([[x, y, x + w, y + h]])
        detections = generator.detect(images, 0)
        for results, stage in (
            (first, detections),
            (refined, generator.refine(images, 0, detections)),
        ):
            best = Boxes(stage.boxes[stage.scores.argmax()][None])
            results.append(pairwise_iou(best, Boxes(generator._regress.boxes)).item())
    mean_first, mean_refined = (sum(x) / len(x) for x in (first, refined))
    assert mean_refined >= least_iou and mean_refined > mean_first + 0.05


def test_touching_objects_give_two_proposals():
    touching = [[100, 100, 260, 300], [260, 100, 420, 300]]
    iou = best_iou(propose(build(), touching), touching)
    assert (iou.amax(dim=1) > 0.85).all()


def test_objects_below_the_search_grid_are_reached_by_refinement():
    # 30 pixels; the smallest searched box has a mean dimension of 56.
    small = [[300, 200, 330, 230]]
    generator = build("MODEL.DETECTORNET.SCORE_THRESH", 0.1)
    before = propose(build("MODEL.DETECTORNET.REFINEMENT.ENABLED", False, *ALL_BOXES), small)
    assert (
        best_iou(before, small).max() < 0.4 < 0.7 < best_iou(propose(generator, small), small).max()
    )


def test_a_box_beyond_a_crop_is_clipped_to_the_image():
    proposals = propose(build(), [[480, 360, 660, 500]])
    boxes = proposals.proposal_boxes.tensor
    assert len(boxes) and (boxes[:, 2] <= 640).all() and (boxes[:, 3] <= 480).all()
    assert best_iou(proposals, [[480, 360, 640, 480]]).max() > 0.5


def test_without_masks_there_are_no_proposals():
    proposals = propose(build(), [])
    assert proposals.proposal_boxes.tensor.shape == (0, 4)
    assert proposals.objectness_logits.shape == (0,)
    assert proposals.image_size == (480, 640)


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (900, 2)])
def test_strange_images(size):
    generator = build(*ALL_BOXES)
    (proposals,), _ = generator(make_images(size), {})
    assert proposals.proposal_boxes.tensor.isfinite().all()
    assert proposals.objectness_logits.isfinite().all()


def test_an_image_gets_the_same_proposals_alone_and_in_a_batch():
    generator = build(*ALL_BOXES)
    for network in generator.network.networks:
        torch.nn.init.normal_(network.output.weight, std=0.3)
    batch = make_images((120, 160), (97, 251))
    alone = ImageList.from_tensors([batch[1]], 32)
    (_, together), _ = generator(batch, {})
    (only,), _ = generator(alone, {})
    assert 5 < len(only) <= 15
    assert torch.equal(together.proposal_boxes.tensor, only.proposal_boxes.tensor)
    assert torch.equal(together.objectness_logits, only.objectness_logits)


def test_the_score_is_the_objectness_and_sorted():
    proposals = propose(build(), OBJECTS)
    scores = proposals.objectness_logits
    assert (scores.diff() <= 0).all() and 4 < scores[0] <= 5 and scores[-1] >= -5


def test_final_nms_drops_refined_duplicates():
    proposals = propose(build("MODEL.DETECTORNET.FINAL_NMS_THRESH", 0.5), OBJECTS)
    iou = pairwise_iou(proposals.proposal_boxes, proposals.proposal_boxes)
    assert (iou.fill_diagonal_(0) <= 0.5).all() and len(proposals) < 15
    assert (best_iou(proposals, OBJECTS).amax(dim=1) > 0.8).all()


def test_classes_have_detections_of_their_own():
    overrides = ["MODEL.DETECTORNET.CLASS_AGNOSTIC", False, "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    kwargs = {"classes": [2, 0, 2], "num_classes": 3}
    proposals = propose(build(*overrides), OBJECTS, **kwargs)
    assert set(proposals.get_fields()) == {
        "proposal_boxes", "objectness_logits", "proposal_classes",
    }  # fmt: skip
    iou = best_iou(proposals, OBJECTS)
    for index, class_id in enumerate(kwargs["classes"]):
        assert iou[index, proposals.proposal_classes == class_id].max() > 0.85
    assert set(proposals.proposal_classes.tolist()) == {0, 2}
    # As many per class as without classes in all.
    assert (proposals.proposal_classes == 2).sum() == 15


def test_best_boxes_are_mapped_back_to_the_image():
    crops = torch.tensor([[100.0, 50.0, 220.0, 110.0], [0.0, 0.0, 50.0, 100.0]])
    objects = torch.tensor([[110.0, 55.0, 210.0, 105.0], [5.0, 10.0, 45.0, 90.0]])
    masks = torch.stack([
        box_mask_targets(box[None], torch.zeros(1).long(), crop[None], 1, 24)[0, 0]
        for box, crop in zip(objects, crops, strict=True)
    ])  # fmt: skip
    grid = SearchGrid((0.75, 0.8, 0.85), (0.8, 0.9, 1.0, 1.1, 1.25))
    boxes, scores = best_boxes(masks, crops, 225, grid)
    assert (pairwise_iou(Boxes(boxes), Boxes(objects)).diagonal() > 0.85).all()
    assert (scores > 4.5).all()


def test_enlarged_boxes():
    boxes = enlarge_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 1.2)
    torch.testing.assert_close(boxes, torch.tensor([[8.0, 16.0, 32.0, 64.0]]))


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
    assert counts["detectornet/num_neg_crops"] <= 38
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


@pytest.mark.parametrize(
    "key, value",
    [
        ("NETWORKS", "one"),
        ("ZERO_WEIGHT", 0.0),
        ("WINDOW_OVERLAP", 1.0),
        ("RING", 1.0),
        ("STRIDE", 0.0),
        ("MEAN_DIMENSIONS", ()),
        ("NUM_SCALES", 0),
        ("WIDTH_FACTOR", 0.0),
    ],
)
def test_settings_that_make_no_sense(key, value):
    with pytest.raises(ValueError, match=key):
        build(f"MODEL.DETECTORNET.{key}", value)
