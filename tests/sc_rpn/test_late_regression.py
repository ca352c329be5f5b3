"""Proposals whose boxes are computed after they are chosen, against those of the whole maps."""

import pytest
import torch
from detectron2.layers import batched_nms, nms
from detectron2.utils.events import EventStorage

from d2proposals.proposals.ranking import probability_to_logit
from d2proposals.sc_rpn import duplicates, generator
from d2proposals.sc_rpn.duplicates import filter_duplicates
from d2proposals.sc_rpn.head import SCRPNHead
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import build_generator, make_batch


def build(text, overrides=()):
    built = build_generator([*rows.node("PRE_NMS_TOPK_TEST 300; " + text), *overrides])
    for name in ("init_offset", "secondary_offset", "classification", "iou_mask"):
        if hasattr(built.head, name):
            torch.nn.init.normal_(getattr(built.head, name).weight, std=0.1)
    return built


def count_dense(monkeypatch):
    """Calls that refine whole maps."""
    calls = []
    predict = SCRPNHead.predict_refined
    monkeypatch.setattr(
        SCRPNHead, "predict_refined", lambda self, x: calls.append(1) or predict(self, x)
    )
    return calls


@pytest.mark.parametrize(
    ("text", "is_late"),
    [
        ("IOU_MASK.FEATURE cls", True),
        ("IOU_MASK.ENABLED False", True),
        ("IOU_MASK.USE_AT_TEST False", True),
        ("IOU_MASK.ENABLED False; ALIGNMENT box; NUM_CONVS 1; " + rows.BOX, True),
        ("", False),
        ("IOU_MASK.FEATURE fused", False),
        ("IOU_MASK.FEATURE cls; DEFORM_SAMPLER torchvision", False),
        (rows.BOX + "IOU_MASK.ENABLED False; ALIGNMENT none", False),
    ],
)
def test_proposals_are_those_of_whole_maps(monkeypatch, text, is_late):
    built = build(text).eval()
    images, features, _ = make_batch()
    calls = count_dense(monkeypatch)
    found = built(images, features)[0]
    assert len(calls) == (not is_late)
    monkeypatch.setattr(generator, "can_regress_late", lambda *args: False)
    expected = built(images, features)[0]
    assert len(calls) == 1 + (not is_late)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) > 100
        torch.testing.assert_close(
            ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor, rtol=1e-5, atol=1e-3
        )
        torch.testing.assert_close(ours.objectness_logits, theirs.objectness_logits)


def test_proposals_of_training_are_late_too(monkeypatch):
    built = build("IOU_MASK.FEATURE cls", ["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True])
    calls = count_dense(monkeypatch)
    with EventStorage():
        proposals, _ = built.train()(*make_batch())
    assert calls == [] and all(len(x) for x in proposals)
    for layer in (built.head.classification, built.head.secondary_offset):
        torch.nn.init.constant_(layer.bias, float("nan"))
        with EventStorage(), pytest.raises(FloatingPointError, match="training has diverged"):
            built.train()(*make_batch())
        torch.nn.init.zeros_(layer.bias)


def random_candidates(number):
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(number, 2, generator=random) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(number, 2, generator=random) * 20], dim=1)
    scores = (torch.rand(number, generator=random) * 50).round() / 50  # many are equal
    return boxes, scores, torch.randint(0, 5, (number,), generator=random)


@pytest.mark.parametrize("topk", [1, 7, 60, 5000])
def test_suppression_of_the_beginning_is_that_of_all_boxes(monkeypatch, topk):
    boxes, scores, levels = random_candidates(1500)
    lengths = []
    monkeypatch.setattr(
        duplicates, "batched_nms", lambda x, *args: lengths.append(len(x)) or batched_nms(x, *args)
    )
    found = filter_duplicates(
        boxes,
        scores,
        levels,
        (200, 200),
        level_nms_thresh=0.6,
        nms_thresh=0.5,
        topk=topk,
        min_box_size=0.0,
    )
    order = scores.argsort(descending=True, stable=True)
    boxes, levels, rank = boxes[order], levels[order], -torch.arange(1500.0)
    keep = batched_nms(boxes, rank, levels, 0.6)
    keep = keep[nms(boxes[keep], rank[keep], 0.5)[:topk]]
    assert torch.equal(found.proposal_boxes.tensor, boxes[keep])
    assert torch.equal(found.objectness_logits, probability_to_logit(scores[order][keep]))
    # Doubled from twice the number until enough stay.
    assert lengths[0] == min(2 * topk, 1500)
    assert all(b == min(2 * a, 1500) for a, b in zip(lengths, lengths[1:], strict=False))
    assert (len(lengths) > 1) == (topk == 60)
    assert lengths[-1] < 1500 or topk == 5000
