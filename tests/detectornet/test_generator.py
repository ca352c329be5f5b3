"""Algorithm 1 as a whole: both stages with perfect masks, classes, batches, edges, settings."""

import pytest
import torch
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, ImageList, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection
from detectron2.utils.events import EventStorage

from d2proposals.detectornet.box_masks import MASK_TYPES, box_mask_targets
from d2proposals.detectornet.crop_sampling import enlarge_boxes
from d2proposals.detectornet.detection import SearchGrid, best_boxes
from tests.common import make_cfg, make_images, make_instances
from tests.detectornet.test_box_search import twin_score

SMALL = ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.03, "MODEL.DETECTORNET.NETWORKS", "shared"]
NAN = float("nan")
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

    def __call__(self, images, crops, index, classes=None):
        self.crops.append(crops)
        masks = box_mask_targets(self.boxes, self.classes.long(), crops, self.num_classes, 24)
        return masks if classes is None else masks[torch.arange(len(crops)), classes][:, None]


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
    (windows, *refinement) = generator._regress.crops
    # One, nine and twenty-five of the image's size, half of it and a quarter, in one run.
    assert [round(640 / x) for x in (windows[:, 2] - windows[:, 0]).tolist()] == (
        [1] + 9 * [2] + 25 * [4]
    )
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
    assert [len(x) for x in first_stage._regress.crops] == [35]


def test_only_the_best_detections_are_refined():
    first = propose(build("MODEL.DETECTORNET.REFINEMENT.ENABLED", False), OBJECTS)
    for number in (0, 4, 100):
        generator = build("MODEL.DETECTORNET.REFINEMENT.TOPK", number)
        proposals = propose(generator, OBJECTS)
        crops = generator._regress.crops[1:]
        assert sum(len(x) for x in crops) == min(number, 15) and len(proposals) == 15
        boxes, before = proposals.proposal_boxes.tensor, first.proposal_boxes.tensor
        stayed = (boxes[:, None] == before).all(dim=2).any(dim=0)
        if number == 4:
            # Those of the best scores, enlarged, are the crops; the others are proposals.
            best = enlarge_boxes(before[:4], 1.2)
            found = (crops[0][:, None] - best).abs().amax(dim=2).amin(dim=1)
            assert found.max() < 1e-3 and not stayed[:4].any() and stayed[4:].all()
        assert number != 0 or stayed.all()


PRUNING = ["MODEL.DETECTORNET.CLASSIFIER.PRUNING_BUDGET", 50,
           "MODEL.DETECTORNET.REFINEMENT.ENABLED", False]  # fmt: skip


def verdicts(generator, decide):
    """Have the classifier give each crop the class that a function of its box says."""
    asked = []

    def classify(images, crops, index):
        asked.append(len(crops))
        classes = torch.tensor([decide(x) for x in crops.tolist()])
        logits = generator.classifier.network.output.out_features
        return torch.nn.functional.one_hot(classes, logits).float()

    generator._classify = classify
    return asked


def test_the_classifier_prunes_before_the_suppression():
    images = ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)])
    pruned = build(*PRUNING, "MODEL.ROI_HEADS.NUM_CLASSES", 3)
    pruned._regress = PerfectNetwork(OBJECTS)
    left = [x for x in OBJECTS if x[0] < 270]
    # The background for whatever begins right of 270 pixels: the middle one of three objects.
    asked = verdicts(pruned, lambda box: 1 if box[0] < 270 else 3)
    found = pruned.detect(images, 0)
    everything = build("MODEL.DETECTORNET.REFINEMENT.ENABLED", False)
    everything._regress = PerfectNetwork(OBJECTS)
    unpruned = everything.detect(images, 0)
    assert (found.boxes[:, 0] < 270).all() and (unpruned.boxes[:, 0] >= 270).any()
    iou = pairwise_iou(Boxes(torch.tensor(left).float()), Boxes(found.boxes)).amax(dim=1)
    assert (iou > 0.6).all() and 0 < sum(asked) <= 3 * 50
    verdicts(pruned, lambda box: 3)
    assert len(pruned.detect(images, 0).boxes) == 0


def test_with_classes_a_box_stays_where_the_classifier_says_its_own():
    generator = build_with_classes(*PRUNING)
    generator._regress = PerfectNetwork(OBJECTS, classes=[2, 0, 2], num_classes=3)
    verdicts(generator, lambda box: 2)
    found = generator.detect(ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)]), 0)
    assert set(found.classes.tolist()) == {2} and len(found.boxes) > 3


def test_the_generator_trains_its_classifier():
    generator = build_with_classes(*PRUNING).train()
    instances = make_instances((120, 160), [[10, 10, 60, 60]])
    with EventStorage():
        _, losses = generator(make_images((120, 160)), {}, [instances])
    assert set(losses) == {"loss_detectornet_mask", "loss_detectornet_pruning"}
    # Four classes at random.
    assert losses["loss_detectornet_pruning"].item() == pytest.approx(1.386, abs=0.2)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in generator.parameters())


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
    assert len(proposals) > 0
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
    # As many, and as good ones, as the objects of the class alone have.
    for class_id, objects in ((2, OBJECTS[::2]), (0, OBJECTS[1:2])):
        alone = propose(build(), objects).objectness_logits
        scores = proposals.objectness_logits[proposals.proposal_classes == class_id]
        assert len(scores) == len(alone) > 3
        torch.testing.assert_close(scores[:3], alone[:3])


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


def test_the_refinement_leaves_out_boxes_beyond_the_crop():
    # Such a box would have no ring on two sides, where the image goes on.
    crop, tall = (
        torch.tensor([[0.0, 0.0, 225.0, 225.0]]),
        torch.tensor([[10.0, -50.0, 212.0, 280.0]]),
    )
    masks = box_mask_targets(tall, torch.zeros(1).long(), crop, 1, 24)[0]
    boxes, _ = best_boxes(masks, crop, 225, SearchGrid((0.5, 0.95), (0.5, 1.0)))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.max() < 0.96 * 225


def test_enlarged_boxes():
    boxes = enlarge_boxes(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), 1.2)
    torch.testing.assert_close(boxes, torch.tensor([[8.0, 16.0, 32.0, 64.0]]))


def own_area_overlap(boxes):
    """(R, R) part of the area of each box (column) that lies in another (row)."""
    boxes = Boxes(boxes)
    return pairwise_intersection(boxes, boxes) / boxes.area()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_non_maximum_suppression_of_a_scale(threshold):
    settings = ["MODEL.DETECTORNET.NUM_SCALES", 1, "MODEL.DETECTORNET.NMS_THRESH", threshold,
                "MODEL.DETECTORNET.TOPK_PER_SCALE", 40]  # fmt: skip
    images, overlaps = ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)]), {}
    for nms_type in ("own_area", "iou"):
        generator = build(*settings, "MODEL.DETECTORNET.NMS_TYPE", nms_type)
        generator._regress = PerfectNetwork(OBJECTS)
        found = generator.detect(images, 0)
        assert len(found.boxes) > 5 and (found.scores.diff() <= 0).all()
        own_area = own_area_overlap(found.boxes).triu(1).max().item()
        iou = pairwise_iou(Boxes(found.boxes), Boxes(found.boxes)).triu(1).max().item()
        overlaps[nms_type] = (own_area, iou)
    # Nearly as much overlap as is allowed, and no more; with "iou", boxes inside better ones.
    assert threshold - 0.2 < overlaps["own_area"][0] <= threshold
    assert threshold - 0.2 < overlaps["iou"][1] <= threshold < overlaps["iou"][0]


@pytest.mark.parametrize("ring_weight", [1.0, 2.0])
def test_scores_of_the_first_stage_equal_the_definition(ring_weight):
    generator = build("MODEL.DETECTORNET.RING_WEIGHT", ring_weight,
                      "MODEL.DETECTORNET.NUM_SCALES", 1)  # fmt: skip
    generator._regress = PerfectNetwork(OBJECTS)
    images = ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)])
    found = generator.detect(images, 0)
    masks = generator._regress(images, torch.tensor([[0.0, 0, 640, 480]]), None)[0, 0].tolist()
    for box, score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True):
        expected, coverage = twin_score(masks, (480, 640), box, 1.2, ring_weight)
        assert score == pytest.approx(expected, abs=1e-4) and coverage > 0.5


def build_with_classes(*overrides, num_classes=3):
    return build("MODEL.DETECTORNET.CLASS_AGNOSTIC", False, "MODEL.ROI_HEADS.NUM_CLASSES",
                 num_classes, *overrides)  # fmt: skip


@pytest.mark.parametrize("networks", ["shared", "per_mask", "per_class_and_mask"])
def test_masks_of_one_class_in_groups_of_crops(networks):
    generator = build_with_classes("MODEL.DETECTORNET.NETWORKS", networks)
    for network in generator.network.networks:
        torch.nn.init.normal_(network.output.weight, std=0.1)
    images, classes = make_images((120, 160), (90, 90)), torch.tensor([2, 0, 2, 1, 0, 2, 2, 1, 0])
    crops = torch.cat(
        [10.0 * torch.arange(18).view(9, 2), 60 + 9.0 * torch.arange(18).view(9, 2)], 1
    )
    with torch.no_grad():
        everything = generator.predict_masks(images, 0, crops)
        assert everything.shape == (9, 3, 5, 24, 24) and everything.std() > 0.1
        expected = everything[torch.arange(9), classes][:, None]
        for generator.crops_at_once in (64, 4, 1):
            masks = generator.predict_masks(images, 0, crops, classes)
            torch.testing.assert_close(masks, expected)


def test_masks_are_clamped():
    generator = build(*ALL_BOXES)

    def regress(images, crops, index, classes=None):
        masks = torch.full((len(crops), 1, 5, 24, 24), 4.0)
        masks[..., :10, :] = -3.0
        masks[..., -1, 5] = 0.25
        return masks

    generator._regress = regress
    masks = generator.predict_masks(make_images((120, 160)), 0, torch.tensor([[0.0, 0, 160, 120]]))
    assert set(masks.unique().tolist()) == {0.0, 0.25, 1.0}
    (proposals,), _ = generator(make_images((120, 160)), {})
    assert proposals.objectness_logits.abs().max() <= 5


def test_final_nms_is_of_each_class():
    generator = build_with_classes("MODEL.DETECTORNET.FINAL_NMS_THRESH", 0.5)
    proposals = propose(generator, [OBJECTS[0]] * 2, classes=[2, 0], num_classes=3)
    boxes, classes = proposals.proposal_boxes, proposals.proposal_classes
    for class_id in (0, 2):
        of_class = boxes[classes == class_id]
        assert (pairwise_iou(of_class, of_class).fill_diagonal_(0) <= 0.5).all()
    assert pairwise_iou(boxes[classes == 0], boxes[classes == 2]).max() > 0.99


def test_small_proposals_are_dropped():
    few, many = (
        propose(build(*ALL_BOXES, "MODEL.DETECTORNET.MIN_BOX_SIZE", size), OBJECTS)
        for size in (90.0, 0.0)
    )
    sides = many.proposal_boxes.tensor[:, 2:] - many.proposal_boxes.tensor[:, :2]
    is_large = (sides > 90).all(dim=1)
    assert 0 < len(few) < len(many)
    assert torch.equal(few.proposal_boxes.tensor, many.proposal_boxes.tensor[is_large])
    assert torch.equal(few.objectness_logits, many.objectness_logits[is_large])


def test_proposals_that_the_masks_speak_against_are_kept():
    # The top mask grows downwards: its part of any box's upper half is smaller.
    generator, masks = build(*ALL_BOXES), torch.zeros(1, 1, 5, 24, 24)
    masks[:, :, MASK_TYPES.index("top")] = torch.linspace(0, 1, 24)[:, None]
    generator._regress = lambda images, crops, *args: masks.repeat(len(crops), 1, 1, 1, 1)
    (proposals,), _ = generator(make_images((120, 160)), {})
    assert len(proposals) == 15 and (proposals.objectness_logits < 0).all()


def test_a_network_without_numbers_has_no_proposals():
    generator = build()
    perfect, stage = PerfectNetwork(OBJECTS), []

    def regress(images, crops, index, classes=None):
        stage.append(classes)
        return perfect(images, crops, index, classes) * (1 if classes is None else torch.nan)

    generator._regress = regress
    (proposals,), _ = generator(ImageList(torch.zeros(1, 3, 480, 640), [(480, 640)]), {})
    assert stage[-1] is not None and len(proposals) == 0


def test_half_precision():
    generator, images = build(*ALL_BOXES).to(torch.bfloat16), make_images((120, 160))
    images.tensor = images.tensor.to(torch.bfloat16)
    (proposals,), _ = generator(images, {})
    assert len(proposals) == 15
    assert proposals.proposal_boxes.tensor.dtype == torch.float32
    assert proposals.objectness_logits.dtype == torch.float32


@pytest.mark.parametrize(
    "key, value",
    [
        ("NETWORKS", "one"),
        ("NMS_TYPE", "area"),
        ("NORM", "foo"),
        ("MASK_SIZE", 0),
        ("PIXEL_STD", [0.0, 1.0, 1.0]),
        ("RING_WEIGHT", -1.0),
        ("HALVES_WEIGHT", -1.0),
        ("NMS_THRESH", -0.1),
        ("NMS_THRESH", 1.1),
        ("FINAL_NMS_THRESH", -0.1),
        ("FINAL_NMS_THRESH", 70.0),
        ("SCORE_THRESH", NAN),
        ("MIN_BOX_SIZE", -1.0),
        ("STRIDE", NAN),
        ("MEAN_DIMENSIONS", (0.5, 1.5)),
        ("ASPECT_RATIOS", (1.0, 0.0)),
        ("REFINEMENT.MEAN_DIMENSIONS", (1.5,)),
        ("REFINEMENT.MEAN_DIMENSIONS", ()),
        ("REFINEMENT.ASPECT_RATIOS", (NAN,)),
        ("REFINEMENT.STRIDE", 0.0),
        ("NUM_CROPS", 0),
        ("ZERO_WEIGHT", 0.0),
        ("WINDOW_OVERLAP", 1.0),
        ("RING", 1.0),
        ("STRIDE", 0.0),
        ("MEAN_DIMENSIONS", ()),
        ("NUM_SCALES", 0),
        ("REFINEMENT.TOPK", -2),
        ("CLASSIFIER.PRUNING_BUDGET", -1),
        ("OBJECT_FRACTION", 1.5),
        ("WIDTH_FACTOR", 0.0),
    ],
)
def test_settings_that_make_no_sense(key, value):
    # AlexNet, which others may use too, does not know where its width is said.
    name = key if key == "WIDTH_FACTOR" else f"MODEL.DETECTORNET.{key} "
    # Without the square ratio, which fits however large the box.
    ratios = ["MODEL.DETECTORNET.REFINEMENT.ASPECT_RATIOS", (0.5, 2.0)]
    with pytest.raises(ValueError, match=f"{name}[^\\n]*$"):
        build(*ratios, f"MODEL.DETECTORNET.{key}", value)
