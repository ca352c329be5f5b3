"""The classifier that prunes detections (Sec. 5.2) and the detector around it."""

import pytest
import torch
from detectron2.modeling import build_model, build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.detectornet import classifier_training
from d2proposals.detectornet.crop_sampling import sample_classifier_crops
from tests.common import make_cfg, make_instances

SMALL = ["MODEL.DETECTORNET.WIDTH_FACTOR", 0.03, "MODEL.DETECTORNET.NUM_CROPS", 8,
         "MODEL.DETECTORNET.CLASSIFIER.NUM_CROPS", 20]  # fmt: skip
CLASSES = 20


def build_heads(*overrides):
    torch.manual_seed(0)
    return build_roi_heads(make_cfg("detectornet_voc.yaml", *SMALL, *overrides), {}).eval()


def make_images(*sizes):
    return ImageList.from_tensors([torch.zeros(3, *size) for size in sizes], 32)


def make_proposals(boxes, scores, classes=None, size=(100, 100)):
    proposals = Instances(size)
    proposals.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    proposals.objectness_logits = torch.tensor(scores)
    if classes is not None:
        proposals.proposal_classes = torch.tensor(classes)
    return proposals


def classify_as(*classes, logit=10.0):
    """A classifier that gives the crops these classes, in turn."""
    logits = logit * torch.nn.functional.one_hot(torch.tensor(classes), CLASSES + 1).float()
    return lambda images, crops, index: logits[: len(crops)]


BOXES = [[0, 0, 40, 40], [50, 0, 90, 40], [0, 50, 40, 90], [50, 50, 90, 90]]


def detect(heads, proposals):
    (detections,), losses = heads(make_images(proposals.image_size), {}, [proposals])
    assert losses == {}
    return detections


def test_only_detections_that_the_classifier_agrees_with_are_kept():
    heads = build_heads()
    # Right class; another class; background; right, but the masks speak against it.
    heads._classify = classify_as(3, 4, CLASSES, 7)
    found = detect(heads, make_proposals(BOXES, [4.5, 4.0, 3.0, -1.0], [3, 5, 3, 7]))
    assert found.pred_boxes.tensor.tolist() == BOXES[:1]
    assert found.pred_classes.tolist() == [3]
    torch.testing.assert_close(found.scores, torch.tensor([0.9]))  # S / 5


@pytest.mark.parametrize(("weight", "score"), [(2.0, 0.5), (0.0, 1.0)])
def test_scores_are_shares_of_the_largest_there_is(weight, score):
    """Of Eq. 3 with another weight of its halves."""
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.ENABLED", False,
                        "MODEL.DETECTORNET.HALVES_WEIGHT", weight)  # fmt: skip
    found = detect(heads, make_proposals(BOXES[:1], [4.5], [3]))
    torch.testing.assert_close(found.scores, torch.tensor([score]))


def test_without_classifier_all_classes_are_kept():
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.ENABLED", False)
    found = detect(heads, make_proposals(BOXES, [4.5, 4.0, 3.0, 2.0], [3, 5, 3, 7]))
    assert found.pred_classes.tolist() == [3, 5, 3, 7]


def test_class_agnostic_proposals_get_class_and_score_from_the_classifier():
    heads = build_heads("MODEL.DETECTORNET.CLASS_AGNOSTIC", True)
    heads._classify = classify_as(3, CLASSES, 0, 1)
    found = detect(heads, make_proposals(BOXES, [4.5, 4.0, 3.0, -2.0]))
    assert sorted(found.pred_classes.tolist()) == [0, 1, 3]
    assert (found.scores > 0.99).all()


def test_duplicates_of_a_class_are_dropped():
    heads = build_heads()
    heads._classify = classify_as(3, 3, 5)
    boxes = [[0, 0, 40, 40], [2, 0, 42, 40], [1, 0, 41, 40]]
    found = detect(heads, make_proposals(boxes, [3.0, 4.0, 2.0], [3, 3, 5]))
    assert found.pred_boxes.tensor.tolist() == boxes[1:]
    assert found.pred_classes.tolist() == [3, 5]


def test_no_proposals_no_detections():
    found = detect(build_heads(), make_proposals([], [], torch.zeros(0).long().tolist()))
    assert len(found) == 0 and found.pred_boxes.tensor.shape == (0, 4)


def test_nothing_tells_the_class():
    with pytest.raises(ValueError, match="CLASS_AGNOSTIC False"):
        build_heads(
            "MODEL.DETECTORNET.CLASS_AGNOSTIC", True, "MODEL.DETECTORNET.CLASSIFIER.ENABLED", False
        )


def test_the_loss_is_the_cross_entropy_of_the_crops():
    heads = build_heads().train()
    targets = [make_instances((100, 100), [[10, 10, 60, 60]]), make_instances((100, 100))]
    with EventStorage() as storage:
        proposals, losses = heads(make_images((100, 100), (100, 100)), {}, ["unused"], targets)
        counts = {k: v[0] for k, v in storage.latest().items()}
    assert proposals == ["unused"]
    # 40 % of 20 for each image, all of the first one; all the negatives of both.
    assert counts["detectornet/num_pos_classifier_crops"] == 16
    assert counts["detectornet/num_neg_classifier_crops"] == 24
    # Untrained: about the same probability for all 21 classes.
    (loss,) = losses.values()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(21.0)).item(), abs=0.2)


@pytest.mark.parametrize("thresholds", [(0.5,), (), (0.2, 0.4, 0.6), (0.6, 0.2), (-0.1, 0.6),
                                        (0.0, 0.6),
                                        (0.2, 60.0), (float("nan"), 0.6)])  # fmt: skip
def test_similarities_that_make_no_sense(thresholds):
    with pytest.raises(ValueError, match="MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS"):
        build_heads("MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS", thresholds)


def test_a_part_that_makes_no_sense():
    with pytest.raises(ValueError, match="CLASSIFIER.HARD_FRACTION makes no sense: 1.5"):
        build_heads("MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION", 1.5)


def test_a_class_beyond_the_number_of_classes_is_named():
    heads, target = build_heads().train(), make_instances((100, 100), [[10, 10, 60, 60]])
    target.gt_classes[:] = 20
    with EventStorage(), pytest.raises(ValueError, match="has class 20.*leaves 0 to 19"):
        heads(make_images((100, 100)), {}, [], [target])


def test_crops_that_make_no_sense():
    with pytest.raises(ValueError, match="MODEL.DETECTORNET.CLASSIFIER.NUM_TRIES"):
        build_heads("MODEL.DETECTORNET.CLASSIFIER.NUM_TRIES", 0)


@pytest.mark.parametrize("enabled", [True, False])
def test_proposals_without_classes_where_they_need_some(enabled):
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.ENABLED", enabled)
    with pytest.raises(ValueError, match="proposals without classes: .* must be DetectorNet"):
        detect(heads, make_proposals(BOXES, [4.5, 4.0, 3.0, 2.0]))


def classifier_by_colour(heads):
    """The classifier says class 0 for dark crops, class 1 for bright ones; returns what it saw."""
    seen = []

    def classify(crops):
        seen.append(crops.mean(dim=(1, 2, 3)))
        is_bright = (seen[-1] > 0.5).long()
        return 20.0 * torch.nn.functional.one_hot(is_bright, CLASSES + 1)

    heads.classifier.forward, heads.normalization = classify, torch.nn.Identity()
    return seen


def dark_and_bright():
    return ImageList.from_tensors([torch.zeros(3, 100, 100), torch.ones(3, 100, 100)], 32)


def test_each_image_s_detections_are_classified_in_that_image():
    heads = build_heads("MODEL.DETECTORNET.CLASS_AGNOSTIC", True)
    classifier_by_colour(heads)
    proposals = [make_proposals(BOXES, [4.0, 3.0, 2.0, 1.0])] * 2
    detections, _ = heads(dark_and_bright(), {}, proposals)
    assert [x.pred_classes.tolist() for x in detections] == [[0] * 4, [1] * 4]


def test_training_crops_are_cut_out_of_their_own_images():
    heads = build_heads().train()
    seen = classifier_by_colour(heads)
    targets = [make_instances((100, 100), [[10, 10, 60, 60]])] * 2
    with EventStorage():
        heads(dark_and_bright(), {}, [], targets)
    (means,) = seen
    assert (means[:20] < 0.01).all() and (means[20:] > 0.99).all() and len(means) == 40


def test_the_weight_of_the_loss():
    losses = []
    for weight in (1.0, 3.0):
        heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.LOSS_WEIGHT", weight).train()
        heads.eval().training = True  # no dropout
        torch.manual_seed(0)
        with EventStorage():
            _, loss = heads(make_images((100, 100)), {}, [], [make_instances((100, 100))])
        losses.append(loss["loss_detectornet_classifier"].item())
    assert losses[1] == pytest.approx(3 * losses[0]) and losses[0] > 0


def test_similarities_reach_the_sampling(monkeypatch):
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.IOU_THRESHOLDS", (0.1, 0.9),
                        "MODEL.DETECTORNET.CLASSIFIER.NUM_CROPS", 60)  # fmt: skip
    crops, box, sizes = [], [[10, 10, 60, 60]], (100, 100)
    classify = heads._classify
    monkeypatch.setattr(heads, "_classify", lambda *x: crops.append(x[1]) or classify(*x))
    torch.manual_seed(0)
    with EventStorage() as storage:
        heads.train()(make_images(sizes), {}, [], [make_instances(sizes, box)])
        num_positives = storage.latest()["detectornet/num_pos_classifier_crops"][0]
    iou = pairwise_iou(Boxes(torch.tensor(box).float()), Boxes(crops[0]))[0]
    assert num_positives >= 1 and (iou[: int(num_positives)] >= 0.9).all()
    assert (iou[int(num_positives) :] < 0.1).all() and len(iou) > 30


def test_the_share_of_hard_negatives_reaches_the_sampling(monkeypatch):
    shares = []
    monkeypatch.setattr(
        classifier_training,
        "sample_classifier_crops",
        lambda *x: shares.append(x[-1]) or sample_classifier_crops(*x),
    )
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.HARD_FRACTION", 0.375).train()
    with EventStorage():
        mined = make_proposals(BOXES, [0.0] * 4)
        heads(make_images((100, 100)), {}, [mined], [make_instances((100, 100))])
    assert shares == [0.375]


def test_no_more_detections_than_wanted():
    heads = build_heads("MODEL.DETECTORNET.CLASSIFIER.ENABLED", False,
                        "TEST.DETECTIONS_PER_IMAGE", 2)  # fmt: skip
    found = detect(heads, make_proposals(BOXES, [3.0, 4.5, 4.0, 2.0], [3, 5, 3, 7]))
    assert found.pred_boxes.tensor.tolist() == [BOXES[1], BOXES[2]]


def test_the_detector_trains_and_detects():
    torch.manual_seed(0)
    overrides = ["MODEL.DETECTORNET.SCORE_THRESH", -1.0, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", -1.0,
                 "MODEL.DETECTORNET.TOPK_PER_SCALE", 1, "MODEL.DETECTORNET.STRIDE", 20.0,
                 "MODEL.DETECTORNET.REFINEMENT.STRIDE", 20.0,
                 "MODEL.DETECTORNET.CLASSIFIER.ENABLED", False]  # fmt: skip
    model = build_model(make_cfg("detectornet_voc.yaml", *SMALL)).train()
    image = torch.randint(0, 256, (3, 96, 128)).float()
    batch = {"image": image, "instances": make_instances((96, 128), [[10, 10, 90, 80]])}
    with EventStorage():
        losses = model([batch])
    assert set(losses) == {"loss_detectornet_mask", "loss_detectornet_classifier"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model = build_model(make_cfg("detectornet_voc.yaml", *SMALL, *overrides)).eval()
    with torch.no_grad():
        (output,) = model([{"image": image, "height": 192, "width": 256}])
    found = output["instances"]
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    assert found.image_size == (192, 256) and len(found) > CLASSES
    assert len(set(found.pred_classes.tolist())) > 1
    assert (found.scores >= 0).all() and (found.scores <= 1).all()
