import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2proposals.proposals.proposal_generator import ProposalGenerator
from d2proposals.zip_rpn import ZIP
from d2proposals.zip_rpn.gray_class_sampling import GRAY, IGNORED, NEGATIVE, POSITIVE
from d2proposals.zip_rpn.head import ZIPHead
from d2proposals.zip_rpn.level_candidates import LevelCandidates, best_of_levels
from d2proposals.zip_rpn.zoom_network import IMAGE_SIZES
from tests.common import make_cfg, make_images, make_instances

LEVELS = {"zoom1": (8, 12), "zoom2": (16, 20), "zoom3": (32, 16)}  # name -> stride, channels
SHAPES = {name: ShapeSpec(channels=c, stride=s) for name, (s, c) in LEVELS.items()}
ANCHORS = ["MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32], [64, 128], [256, 512]],
           "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.25, 0.5, 1.0, 2.0, 4.0]]]  # fmt: skip


def build(*overrides, shapes=SHAPES) -> ZIP:
    torch.manual_seed(0)
    settings = ["MODEL.PROPOSAL_GENERATOR.NAME", "ZIP", "MODEL.ZIP.HEAD_CHANNELS", 16, *ANCHORS]
    return build_proposal_generator(make_cfg(None, *settings, *overrides), shapes)


def make_features(images, shapes=SHAPES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height, width = images.tensor.shape[-2:]
    return {
        name: torch.randn(
            len(images), s.channels, height // s.stride, width // s.stride, generator=generator
        )
        for name, s in shapes.items()
    }


def run(generator, images, features, gt=None):
    with EventStorage():
        return generator(images, features, gt)


def louder(generator):
    """Larger weights, so that scores and boxes differ as they do after training."""
    for parameter in generator.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return generator


def test_anchors_are_thirty_in_three_groups_with_unshared_heads():
    generator = build()
    assert generator.anchor_generator.num_anchors == [10, 10, 10]
    areas = [
        a.prod(1) for a in ((b[:, 2:] - b[:, :2]) for b in generator.anchor_generator.cell_anchors)
    ]
    for group, sizes in zip(areas, ((16, 32), (64, 128), (256, 512)), strict=True):
        expected = torch.tensor(sizes).repeat_interleave(5).square().float()
        assert torch.allclose(group, expected, rtol=1e-4)
    assert len(generator.heads.heads) == 3


def test_a_head_is_a_rectified_convolution_and_two_of_one_cell():
    head = ZIPHead(in_channels=1, channels=2, num_anchors=2, num_classes=3)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        # A sum of 3x3 and its negative.
        head.conv.weight[:, 0] = torch.tensor([1.0, -1.0])[:, None, None]
        head.class_logits.weight[:, 0, 0, 0] = torch.arange(1.0, 7.0)
        head.class_logits.weight[:, 1, 0, 0] = 100.0
        head.anchor_deltas.weight[:, 0, 0, 0] = torch.arange(8.0)
        logits, deltas = head(torch.tensor([[[[1.0, 2.0]]]]))
    # Both cells see 1 + 2; the negative sum is rectified away. (row, column, anchor) by class.
    expected = 3 * torch.arange(1.0, 7.0).reshape(2, 3)
    assert torch.equal(logits, expected.repeat(2, 1)[None])
    assert torch.equal(deltas, 3 * torch.arange(8.0).reshape(2, 4).repeat(2, 1)[None])


def test_proposals_honour_the_contract():
    generator = louder(build()).eval()
    images = make_images((96, 120), (128, 100))
    proposals, losses = run(generator, images, make_features(images))
    assert losses == {} and len(proposals) == 2
    for proposals_i, size in zip(proposals, images.image_sizes, strict=True):
        assert proposals_i.image_size == tuple(size)
        assert set(proposals_i.get_fields()) == {"proposal_boxes", "objectness_logits"}
        boxes, logits = proposals_i.proposal_boxes.tensor, proposals_i.objectness_logits
        assert 0 < len(boxes) <= 1000 and boxes.isfinite().all()
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
        assert (logits[1:] < logits[:-1]).all() and logits.abs().max() < 14


def test_an_image_gets_the_same_proposals_alone_and_in_a_padded_batch():
    generator = louder(build()).eval()
    images = make_images((75, 100), (128, 160))
    features = make_features(images)
    alone = make_images((75, 100))
    alone_features = {
        name: x[:1, :, : 96 // LEVELS[name][0], : 128 // LEVELS[name][0]]
        for name, x in features.items()
    }
    (first, _), _ = run(generator, images, features)
    (only,), _ = run(generator, alone, alone_features)
    assert len(first) == len(only)
    assert torch.allclose(first.proposal_boxes.tensor, only.proposal_boxes.tensor, atol=1e-4)
    assert torch.allclose(first.objectness_logits, only.objectness_logits, atol=1e-5)


def test_labels_never_lie_in_the_padding_and_match_the_objects():
    generator = build("MODEL.ZIP.LOW_QUALITY_MATCH", True)
    images = make_images((64, 64), (128, 160))
    gt = [
        make_instances((64, 64), [[4, 4, 36, 36]]),
        make_instances((128, 160), [[30, 40, 90, 100]]),
    ]
    anchors, valid, *_ = generator.predict(images, make_features(images))
    labels, boxes = generator.label_and_sample_anchors(anchors, valid, gt)
    for level, (stride, _) in zip(labels, LEVELS.values(), strict=True):
        cells = level[0].view(128 // stride, 160 // stride, 10)
        assert (cells[math.ceil(64 / stride) :] == IGNORED).all()
        assert (cells[:, math.ceil(64 / stride) :] == IGNORED).all()
    for n in range(2):
        positives = [(level[n] == POSITIVE) for level in labels]
        assert sum(p.sum() for p in positives) > 0
        for p, b in zip(positives, boxes, strict=True):
            assert (b[n][p] == gt[n].gt_boxes.tensor).all()


@pytest.mark.parametrize("shared", [False, True])
def test_losses_alone_are_those_of_all_cells(shared, monkeypatch):
    """In values and gradients; whoever watches the heads sees all cells."""
    shapes = {name: ShapeSpec(channels=12, stride=s.stride) for name, s in SHAPES.items()}
    shapes = shapes if shared else SHAPES
    overrides = ("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False)
    generator = build(*overrides, "MODEL.ZIP.SHARED_HEAD", shared, shapes=shapes)
    images = make_images((64, 64), (128, 160))
    gt = [
        make_instances((64, 64), [[4, 4, 36, 36]]),
        make_instances((128, 160), [[30, 40, 90, 100], [0, 0, 20, 160]]),
    ]
    features = make_features(images, shapes)
    for x in features.values():
        x.requires_grad_()
    looked_at = []
    forward = generator.heads.forward
    monkeypatch.setattr(generator.heads, "forward", lambda x: looked_at.append(1) or forward(x))

    def losses_and_gradients():
        torch.manual_seed(3)  # the same samples
        with EventStorage():
            empty, losses = generator(images, features, gt)
        assert [len(x) for x in empty] == [0, 0]
        inputs = [*features.values(), *generator.parameters()]
        return losses, torch.autograd.grad(sum(losses.values()), inputs)

    losses, gradients = losses_and_gradients()
    assert not looked_at
    with monkeypatch.context() as patch:
        patch.setattr(type(generator), "losses_alone", ProposalGenerator.losses_alone)
        expected, expected_gradients = losses_and_gradients()
    assert looked_at == [1] and losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)
    assert all(gradient.any() for gradient in gradients[: len(features)])
    handle = next(generator.heads.children()).register_forward_hook(lambda *_: None)
    losses_and_gradients()
    assert looked_at == [1, 1]
    handle.remove()
    losses_and_gradients()
    assert looked_at == [1, 1]

    class OtherHead(ZIPHead):
        """Might compute something else."""

    generator.heads.heads[0].__class__ = OtherHead
    losses_and_gradients()
    assert looked_at == [1, 1, 1]


def hand_made_case():
    """Two anchors on one level: a positive with its target, a negative, a gray, one ignored."""
    anchors = [
        Boxes(torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [5, 5, 9, 9]]))
    ]
    logits = [torch.tensor([[[0.0, 2.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0], [9.0, 0.0, 0.0]]])]
    deltas = [torch.tensor([[[0.1, 0.2, 0.3, 0.4], [9.0] * 4, [9.0] * 4, [9.0] * 4]])]
    labels = [torch.tensor([[POSITIVE, NEGATIVE, GRAY, IGNORED]])]
    gt_boxes = [torch.tensor([[[1.0, 0.0, 11.0, 10.0]] * 4])]  # shifted right by a tenth
    return anchors, logits, deltas, labels, gt_boxes


def test_losses_are_eq_6_by_hand():
    generator = build(
        "MODEL.ZIP.IN_FEATURES", ["zoom1"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]
    )
    with EventStorage():
        losses = generator.losses(*hand_made_case())
    cross_entropy = [
        math.log(1 + math.exp(2) + math.e) - 2,
        math.log(math.e + 2) - 1,
        math.log(2 + math.exp(3)) - 3,
    ]
    assert losses["loss_zip_cls"].item() == pytest.approx(sum(cross_entropy) / 3, abs=1e-5)
    # Target offsets (.1, 0, 0, 0): squared error 0 + .04 + .09 + .16, over three samples.
    assert losses["loss_zip_loc"].item() == pytest.approx(0.29 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("beta", "expected"),
    # Errors 0, .2, .3 and .4: beyond a beta of .25 a line.
    [(1.0, 0.5 * 0.29), (0.25, 0.2**2 / 2 / 0.25 + (0.3 - 0.125) + (0.4 - 0.125))],
)
def test_smooth_l1_and_weights_by_hand(beta, expected):
    generator = build(
        "MODEL.ZIP.IN_FEATURES", ["zoom1"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]],
        "MODEL.ZIP.BBOX_REG_LOSS_TYPE", "smooth_l1", "MODEL.ZIP.LOSS_WEIGHT", 3.0,
        "MODEL.ZIP.BBOX_REG_LOSS_WEIGHT", 2.0, "MODEL.ZIP.SMOOTH_L1_BETA", beta,
    )  # fmt: skip
    with EventStorage():
        losses = generator.losses(*hand_made_case())
    assert losses["loss_zip_loc"].item() == pytest.approx(6 * expected / 3, abs=1e-5)


def test_levels_are_summed_not_averaged():
    one = build("MODEL.ZIP.IN_FEATURES", ["zoom1"], "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]])
    two = build(
        "MODEL.ZIP.IN_FEATURES", ["zoom1", "zoom2"],
        "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32], [64, 128]],
    )  # fmt: skip
    case = hand_made_case()
    with EventStorage():
        single = one.losses(*case)
        double = two.losses(*[values * 2 for values in case])
    for name, value in single.items():
        assert double[name].item() == pytest.approx(2 * value.item(), rel=1e-6)


@pytest.mark.parametrize("two_classes", [False, True])
@pytest.mark.parametrize(
    "boxes",
    [
        ([], []),
        ([[10, 10, 50, 60]], []),
        ([[10, 10, 11, 60]], [[3, 3, 4, 4]]),
        ([[-50, -50, 300, 300]], [[0, 0, 160, 128]]),
        ([[i, i, i + 20, i + 20] for i in range(100)], [[40, 40, 72, 72]]),
    ],
    ids=["none", "half_empty", "one_pixel", "bigger_than_image", "many"],
)
def test_training_losses_are_finite_and_reach_every_parameter(boxes, two_classes):
    generator = build("MODEL.ZIP.GRAY_CLASS.ENABLED", not two_classes)
    images = make_images((96, 120), (128, 160))
    gt = [make_instances(s, b) for s, b in zip(images.image_sizes, boxes, strict=True)]
    features = {k: v.requires_grad_() for k, v in make_features(images).items()}
    proposals, losses = run(generator, images, features, gt)
    assert set(losses) == {"loss_zip_cls", "loss_zip_loc"}
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())
    assert all(len(p) > 0 for p in proposals)


@pytest.mark.parametrize(("gray_in_score", "score"), [(True, 2 / 6), (False, 2 / 3)])
def test_the_gray_class_in_a_score(gray_in_score, score):
    # Background, object and gray as 1 to 2 to 3; a second anchor is gray almost for sure.
    logits = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 8.0, 991.0]]]).log()
    (found,) = best_of_levels(
        [Boxes(torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]]))],
        [torch.ones(1, 2, dtype=torch.bool)],
        [logits],
        [torch.zeros(1, 2, 4)],
        Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        2,
        gray_in_score,
    )
    assert score in [pytest.approx(x) for x in found.scores.tolist()]
    # Against background alone the second is the better one.
    assert found.boxes[0].tolist() == ([0, 0, 8, 8] if gray_in_score else [8, 8, 16, 16])


def test_no_proposals_are_decoded_in_training_when_nobody_wants_them():
    generator = build("MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", False)
    images = make_images((96, 120))
    generator.predict_proposals = None  # calling it would fail
    proposals, losses = run(generator, images, make_features(images), [make_instances((96, 120))])
    assert [len(p) for p in proposals] == [0] and losses
    assert set(proposals[0].get_fields()) == {"proposal_boxes", "objectness_logits"}


def test_counts_are_logged():
    generator = build()
    images = make_images((128, 128), (128, 128))
    gt = [make_instances((128, 128), [[0, 0, 64, 64]]), make_instances((128, 128))]
    with EventStorage() as storage:
        generator(images, make_features(images), gt)
        logged = {name: value for name, (value, _) in storage.latest().items()}
    assert logged["zip/num_pos_anchors"] > 0
    by_level = sum(logged[f"zip/num_pos_anchors_{name}"] for name in LEVELS)
    assert by_level == pytest.approx(logged["zip/num_pos_anchors"])
    assert logged["zip/num_neg_anchors"] > 0 and "zip/num_gray_anchors" in logged


def test_score_is_the_probability_of_an_object_without_the_gray_class():
    generator = build("MODEL.ZIP.MULTI_NMS_THRESHOLDS", (), "MODEL.ZIP.MULTI_NMS_TOPKS", ()).eval()
    images = make_images((32, 32))
    anchors, valid, logits, deltas, _ = generator.predict(images, make_features(images))
    logits = [torch.zeros_like(x) for x in logits]
    logits[1][0, 7] = torch.tensor([0.0, 2.0, 3.0])  # the gray class is the likeliest
    (proposals,) = generator.predict_proposals(anchors, valid, logits, deltas, [(32, 32)])
    best = proposals.objectness_logits[0].sigmoid().item()
    others = math.exp(2) / (1 + math.exp(2) + math.exp(3))
    assert best == pytest.approx(max(others, 1 / 3), abs=1e-4)


def test_level_bias_moves_a_level_up_the_ranking():
    images = make_images((128, 160))
    features = make_features(images)
    plain = louder(build()).eval()
    biased = louder(build("MODEL.ZIP.LEVEL_BIAS", (0.0, 0.0, 1.0))).eval()
    biased.load_state_dict(plain.state_dict())
    (before,), (after,) = plain.candidates(images, features), biased.candidates(images, features)
    assert torch.equal(before[0], after[0])
    difference = (after[1] - before[1]).round(decimals=4)
    assert set(difference.tolist()) == {0.0, 1.0}
    sides = (after[0][:, 2:] - after[0][:, :2]).amax(dim=1)
    assert sides[difference == 1].mean() > sides[difference == 0].mean()


def test_level_nms_keeps_overlapping_boxes_of_different_levels_and_caps_each_level():
    suppress = build("MODEL.ZIP.LEVEL_NMS_TOPK", 2).level_suppression
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    )
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    levels = torch.tensor([0, 0, 1, 0, 0])
    kept, kept_scores, kept_levels = suppress(LevelCandidates(boxes, scores, levels), (64, 64))
    # The second box is suppressed by the first, the third is of another level, the last is third.
    assert torch.equal(kept, boxes[[0, 2, 3]]) and torch.equal(kept_scores, scores[[0, 2, 3]])
    assert kept_levels.tolist() == [0, 1, 0]
    nothing = suppress(LevelCandidates(boxes, scores - 2, levels), (64, 64))  # all padding
    assert [len(x) for x in nothing] == [0, 0, 0]


NO_MULTI_NMS = ["MODEL.ZIP.MULTI_NMS_THRESHOLDS", (), "MODEL.ZIP.MULTI_NMS_TOPKS", ()]


@pytest.mark.parametrize("training, topk", [(True, 5), (False, 50)])
def test_pre_nms_topk_boxes_of_each_level_enter_its_nms(training, topk):
    # A threshold that no box exceeds; untrained, boxes are about anchors, none of them empty.
    generator = build(
        "MODEL.ZIP.PRE_NMS_TOPK_TRAIN", 5, "MODEL.ZIP.PRE_NMS_TOPK_TEST", 50,
        "MODEL.ZIP.LEVEL_NMS_THRESH", 1.0,
    ).train(training)  # fmt: skip
    images = make_images((128, 160), (96, 128))
    features = make_features(images)
    _, valid, logits, *_ = generator.predict(images, features)
    candidates = generator.candidates(images, features)
    for n, (boxes, scores) in enumerate(candidates):
        assert len(boxes) == 3 * topk
        best = []
        for logits_i, valid_i in zip(logits, valid, strict=True):
            on_image = valid_i[n].flatten().bool().repeat_interleave(10)
            probability = logits_i[n].softmax(dim=1)[on_image, POSITIVE]
            best.append(probability.sort(descending=True).values[:topk])
        assert torch.allclose(scores.sort().values, torch.cat(best).sort().values)


@pytest.mark.parametrize("multi_nms", [[], NO_MULTI_NMS], ids=["multi_nms", "by_score"])
@pytest.mark.parametrize("training, topk", [(True, 40), (False, 7)])
def test_post_nms_topk_proposals_are_left(training, topk, multi_nms):
    generator = build(
        "MODEL.ZIP.POST_NMS_TOPK_TRAIN", 40, "MODEL.ZIP.POST_NMS_TOPK_TEST", 7, *multi_nms
    ).train(training)
    images = make_images((128, 160), (96, 128))
    gt = [make_instances(size, [[20, 20, 80, 70]]) for size in images.image_sizes]
    proposals, losses = run(generator, images, make_features(images), gt if training else None)
    assert [len(p) for p in proposals] == [topk, topk]
    assert bool(losses) == training


def test_boxes_with_a_short_side_are_dropped():
    every_box = ["MODEL.ZIP.LEVEL_NMS_THRESH", 1.0, "MODEL.ZIP.LEVEL_NMS_TOPK", 10_000]
    images = make_images((128, 160))
    features = make_features(images)
    ((boxes, _),) = build(*every_box).eval().candidates(images, features)
    generator = build(*every_box, "MODEL.ZIP.MIN_BOX_SIZE", 20.0).eval()
    ((left, _),) = generator.candidates(images, features)
    is_long = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > 20
    assert is_long.any() and not is_long.all()
    # Sorted, as boxes of equal scores are in no particular order.
    assert sorted(left.tolist()) == sorted(boxes[is_long].tolist())


def test_select_of_all_candidates_is_what_forward_returns():
    generator = louder(build()).eval()
    images = make_images((96, 120))
    features = make_features(images)
    ((boxes, scores),) = generator.candidates(images, features)
    selected = generator.select(boxes, scores, (96, 120))
    (proposals,), _ = run(generator, images, features)
    assert torch.equal(selected.proposal_boxes.tensor, proposals.proposal_boxes.tensor)
    assert torch.equal(selected.objectness_logits, proposals.objectness_logits)


def test_runs_on_a_plain_fpn_with_a_shared_head():
    shapes = {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 7)}
    generator = build(
        "MODEL.ZIP.IN_FEATURES", list(shapes), "MODEL.ZIP.SHARED_HEAD", True,
        "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32], [32, 64], [64, 128], [128, 256], [256, 512]],
        shapes=shapes,
    )  # fmt: skip
    images = make_images((100, 90), divisibility=64)
    proposals, losses = run(
        generator,
        images,
        make_features(images, shapes),
        [make_instances((100, 90), [[5, 5, 40, 50]])],
    )
    assert len(generator.heads.heads) == 1 and len(proposals[0]) > 0
    assert all(loss.isfinite() for loss in losses.values())


def test_a_wrong_extent_is_warned_of_once(caplog):
    generator = build().eval()
    images = make_images((96, 120))
    features = {**make_features(images), IMAGE_SIZES: torch.tensor([[90, 120]])}
    with caplog.at_level("WARNING"):
        run(generator, images, features)
        run(generator, images, features)
    assert len([r for r in caplog.records if "took image borders for padding" in r.message]) == 1


def test_infinite_predictions_end_training_and_are_dropped_in_evaluation():
    generator = build()
    images = make_images((64, 64))
    anchors, valid, logits, deltas, _ = generator.predict(images, make_features(images))
    logits, deltas = [x * 0 for x in logits], [x * 0 for x in deltas]
    deltas[2][0, 3] = float("nan")
    arguments = anchors, valid, logits, deltas, images.image_sizes
    with pytest.raises(FloatingPointError, match="training has diverged"):
        generator.predict_proposals(*arguments)
    (proposals,) = generator.eval().predict_proposals(*arguments)
    assert len(proposals) > 0 and proposals.proposal_boxes.tensor.isfinite().all()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.ZIP.IN_FEATURES", ["p2", "zoom2", "zoom3"]], r"\['p2'\], which the backbone"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[16], [64]]], "2 groups for the 3 levels"),
        (["MODEL.ZIP.LEVEL_BIAS", (0.1, 0.2)], "2 numbers for 3 levels"),
        (["MODEL.ZIP.BBOX_REG_LOSS_TYPE", "giou"], "BBOX_REG_LOSS_TYPE must be"),
        (["MODEL.ZIP.SHARED_HEAD", True], "SHARED_HEAD needs the same channels"),
        (["MODEL.ZIP.MULTI_NMS_TOPKS", (10,)], "^MODEL.ZIP.MULTI_NMS_THRESHOLDS .*both decreasing"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(*overrides)


def test_anchors_that_fall_while_strides_grow_are_named(caplog):
    build()
    build("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]])
    build("MODEL.ANCHOR_GENERATOR.SIZES", [16, 32, 64])
    assert not caplog.records
    build("MODEL.ANCHOR_GENERATOR.SIZES", [[256, 512], [64, 128], [16, 32]])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert (
        "zoom2, of stride 16, has anchors up to 128 pixels, and zoom1, of stride 8" in messages[0]
    )
