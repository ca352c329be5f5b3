"""From SCRPN's predictions to its proposals: decoding, scores, NMS, padding."""

import pytest
import torch
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from d2proposals.proposals.ranking import probability_to_logit
from d2proposals.sc_rpn.pixel_boxes import boxes_in_pixels, reference_boxes
from d2proposals.sc_rpn.predictions import HeadPredictions
from tests.sc_rpn import ablation_rows as rows
from tests.sc_rpn.builders import build_generator, build_locations, make_batch


@pytest.mark.parametrize("row", ["III IoU mask", "III baseline", "III alignment"])
def test_proposals_keep_the_contract(row):
    generator = build_generator(rows.node(rows.ROWS[row])).eval()
    images, features, _ = make_batch()
    proposals, losses = generator(images, features)
    assert losses == {}
    for p, (height, width) in zip(proposals, images.image_sizes, strict=True):
        assert p.image_size == (height, width)
        assert sorted(p.get_fields()) == ["objectness_logits", "proposal_boxes"]
        boxes, logits = p.proposal_boxes.tensor, p.objectness_logits
        assert 0 < len(p) <= 1000
        assert (logits.diff() <= 0).all() and logits.isfinite().all()
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert p.proposal_boxes.nonempty().all()
        iou = pairwise_iou(p.proposal_boxes, p.proposal_boxes).fill_diagonal_(0)
        assert iou.max() <= 0.8
    again = generator(images, features)[0]
    assert torch.equal(again[0].proposal_boxes.tensor, proposals[0].proposal_boxes.tensor)


def test_scores_are_the_mean_of_classification_and_mask():
    predictions = HeadPredictions(
        torch.zeros(1, 2, 18),
        torch.tensor([[0.0, 2.0]]),
        torch.zeros(1, 2, 18),
        torch.tensor([[0.0, -1e4]]),
    )
    # sigmoid(0) = .5 and sigmoid(sigmoid(0)) = .622459; sigmoid(2) = .880797 and sigmoid(0) = .5.
    scores = build_generator().scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5612297, 0.6903985]]))
    scores = build_generator(rows.node("IOU_MASK.USE_AT_TEST False")).scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.8807971]]))
    # The mask alone, sigmoid(sigmoid(0)) and sigmoid(0); not where it is left out of the score.
    alone = "IOU_MASK.SCORE mask"
    scores = build_generator(rows.node(alone)).scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.6224593, 0.5]]))
    generator = build_generator(rows.node(f"{alone}; IOU_MASK.USE_AT_TEST False"))
    torch.testing.assert_close(generator.scores(predictions), torch.tensor([[0.5, 0.8807971]]))
    scores = build_generator(rows.node("IOU_MASK.NUM_SIGMOID 1")).scores(predictions)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.4403985]]))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("IOU_MASK.SCORE product", "unknown MODEL.SCRPN.IOU_MASK.SCORE 'product', choose one of"),
        ("IOU_MASK.SCORE mask; IOU_MASK.ENABLED False", "needs IOU_MASK.ENABLED True"),
    ],
)
def test_unknown_scores_are_one_line(text, line):
    with pytest.raises(ValueError, match=line):
        build_generator(rows.node(text))


def test_duplicates_are_filtered_on_each_map_and_then_over_all():
    generator = build_generator().eval()
    a, b, c = [0.0, 0, 100, 100], [0, 0, 100, 78], [0, 0, 100, 61]
    # IoU(a, b) = .78, IoU(b, c) = .782: all stay on one map at .8; equal boxes of two maps do not.
    boxes = torch.tensor([a, b, c, a, [500.0, 500, 600, 600], [0, 0, 0, 50]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.94])
    levels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = generator._filter_duplicates(boxes, scores, levels, (200, 200))
    assert found.proposal_boxes.tensor.tolist() == [a, b, c]
    torch.testing.assert_close(found.objectness_logits, probability_to_logit(scores[:3]))


@pytest.mark.parametrize(
    ("level_threshold", "threshold", "same_map", "two_maps"), [(0.9, 0.5, 1, 1), (0.5, 0.9, 1, 2)]
)
def test_each_nms_has_its_threshold(level_threshold, threshold, same_map, two_maps):
    text = f"LEVEL_NMS_THRESH {level_threshold}; NMS_THRESH {threshold}"
    generator = build_generator(rows.node(text)).eval()
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 78]])  # IoU .78
    for levels, expected in (([0, 0], same_map), ([0, 1], two_maps)):
        found = generator._filter_duplicates(
            boxes, torch.tensor([0.9, 0.8]), torch.tensor(levels), (200, 200)
        )
        assert len(found) == expected


def test_small_boxes_are_dropped():
    generator = build_generator(rows.node("MIN_BOX_SIZE 10.0")).eval()
    boxes = torch.tensor([[0.0, 0, 50, 5], [100, 100, 111, 111], [195, 0, 215, 50]])
    found = generator._filter_duplicates(
        boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), (200, 200)
    )
    # The last one has 5 pixels in the image.
    assert found.proposal_boxes.tensor.tolist() == [[100, 100, 111, 111]]


WITHOUT_NMS = "LEVEL_NMS_THRESH 1.0; NMS_THRESH 1.0; "


@pytest.mark.parametrize(
    ("text", "in_training", "in_test"),
    [
        ("PRE_NMS_TOPK_TRAIN 2; PRE_NMS_TOPK_TEST 3", 5 * 2, 5 * 3),
        ("POST_NMS_TOPK_TRAIN 7; POST_NMS_TOPK_TEST 5", 7, 5),
    ],
)
def test_numbers_of_proposals_in_training_and_test(text, in_training, in_test):
    generator = build_generator(
        [*rows.node(WITHOUT_NMS + text), "MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True]
    )
    images, features, gt_instances = make_batch(((192, 192), (150, 180)), ([], []))
    with EventStorage():
        proposals, _ = generator.train()(images, features, gt_instances)
    assert [len(p) for p in proposals] == [in_training] * 2
    assert [len(p) for p in generator.eval()(images, features)[0]] == [in_test] * 2


@pytest.mark.parametrize("row", ["III IoU mask", "III alignment"])
def test_proposals_are_the_refined_boxes(row):
    text = "PRE_NMS_TOPK_TEST 5000; POST_NMS_TOPK_TEST 5000; "
    generator = build_generator(rows.node(rows.ROWS[row] + "; " + WITHOUT_NMS + text)).eval()
    is_box = row == "III alignment"
    with torch.no_grad():
        for layer in (generator.head.init_offset, generator.head.secondary_offset):
            layer.weight.zero_()
        # Half a cell to the right: points are (y, x) in cells, deltas (x, y, w, h) in widths of 8.
        bias = generator.head.secondary_offset.bias
        bias[slice(0, 1) if is_box else slice(1, None, 2)] = 0.5 / 8 if is_box else 0.5
    images, features, _ = make_batch(((64, 96),), ([],))
    locations = build_locations((64, 96))
    side = 4 * locations.stride_of_location[:, None]
    expected = torch.cat([locations.centers - side, locations.centers + side], dim=1)
    expected[:, 0::2] += side / 8
    expected[:, 0::2] = expected[:, 0::2].clamp(0, 96)
    expected[:, 1::2] = expected[:, 1::2].clamp(0, 64)
    expected = expected[locations.is_valid[0]]
    found = generator(images, features)[0][0].proposal_boxes.tensor
    torch.testing.assert_close(*(torch.tensor(sorted(x.tolist())) for x in (found, expected)))


def constant_predictions(num_samples, logit=-5.0):
    """Points on their initial square, no refinement, an undecided IoU mask."""
    points = build_generator().head.representation.decode_init(torch.zeros(1, num_samples, 18))
    logits = torch.full((1, num_samples), logit)
    return HeadPredictions(points, logits, torch.zeros_like(points), torch.zeros_like(logits))


def test_best_of_a_map_have_the_best_iou_aware_score():
    # Of cell (5, 5) class and mask are .88 and .5, of cell (9, 9) .73 and .73.
    locations = build_locations((64, 64))
    predictions = constant_predictions(locations.num_locations)
    for row, class_logit, mask_logit in ((5, 2.0, -1e4), (9, 1.0, 1e4)):
        predictions.class_logits[0, 17 * row] = class_logit
        predictions.iou_mask[0, 17 * row] = mask_logit
    boxes = []
    for use_mask in (True, False):
        text = f"PRE_NMS_TOPK_TEST 1; IOU_MASK.USE_AT_TEST {use_mask}"
        generator = build_generator(rows.node(text)).eval()
        found = generator.predict_proposals(predictions, locations, [(64, 64)])[0]
        boxes.append(found.proposal_boxes.tensor[0].tolist())
    # Squares of 32 pixels around (38, 38) and (22, 22).
    assert boxes == [[22, 22, 54, 54], [6, 6, 38, 38]]


def test_locations_in_the_padding_do_not_propose():
    # Whatever they predict: the best scores and boxes that reach into the image.
    generator = build_generator(rows.node(WITHOUT_NMS)).eval()
    locations = build_locations((100, 90), map_sizes=[(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)])
    predictions = constant_predictions(locations.num_locations)
    predictions.class_logits[~locations.is_valid] = 5.0
    found = generator.predict_proposals(predictions, locations, [(100, 90)])[0]
    # Centres in the image: 25 x 22 cells of 4 pixels (the last begins at 88 and its centre is 90),
    # 12 x 11 of 8, 6 x 6 of 16, 3 x 3 of 32 and 2 x 1 of 64.
    assert len(found) == locations.is_valid.sum() == 25 * 22 + 12 * 11 + 6 * 6 + 3 * 3 + 2 * 1
    assert (found.objectness_logits < 0).all()


def test_features_in_the_padding_do_not_matter():
    generator = build_generator().eval()
    images, features, _ = make_batch()
    height, width = images.image_sizes[1]
    changed = {name: x.clone() for name, x in features.items()}
    for x, stride in zip(changed.values(), generator.strides, strict=True):
        x[1, :, -(-height // stride) :] = 50.0
        x[1, :, :, -(-width // stride) :] = 50.0
    assert not torch.equal(changed["p6"], features["p6"])
    (_, expected), (_, found) = (generator(images, maps)[0] for maps in (features, changed))
    assert torch.equal(found.proposal_boxes.tensor, expected.proposal_boxes.tensor)
    assert torch.equal(found.objectness_logits, expected.objectness_logits)


def test_three_anchors_of_a_location_follow_each_other():
    generator = build_generator(rows.node(rows.ROWS["III baseline"])).eval()
    with torch.no_grad():
        generator.head.init_offset.weight.zero_()
    _, features, _ = make_batch(((64, 64),), ([],))
    maps = list(features.values())
    predictions = generator.head(maps, [torch.ones_like(x[:, :1]) for x in maps])
    locations = build_locations((64, 64))
    representation = generator.head.representation
    anchors = reference_boxes(representation, locations)
    found = boxes_in_pixels(representation, predictions.init_shape, locations)
    torch.testing.assert_close(found[0], anchors)
    # Height / width .5, 1 and 2 of area 32^2 around (2, 2) and then around (6, 2).
    center = (anchors[:6, :2] + anchors[:6, 2:]) / 2
    size = anchors[:6, 2:] - anchors[:6, :2]
    torch.testing.assert_close(center, torch.tensor([[2.0, 2]] * 3 + [[6, 2]] * 3))
    torch.testing.assert_close(size[:, 1] / size[:, 0], torch.tensor([0.5, 1, 2] * 2))


def test_maps_of_three_anchors_propose_all_of_theirs():
    generator = build_generator(rows.node("PRE_NMS_TOPK_TEST 1; " + rows.ROWS["III baseline"]))
    locations = build_locations((64, 64))
    starts = [0, 3 * 256, 3 * 320, 3 * 336, 3 * 340, 3 * 341]  # 16 x 16, 8 x 8, ..., 1 x 1 cells
    slices = [locations.level_slice(i, 3) for i in range(5)]
    assert [s.start for s in slices] == starts[:-1] and [s.stop for s in slices] == starts[1:]
    # The last anchor of each map is its best one.
    logits = torch.full((1, starts[-1]), -5.0)
    logits[0, [s.stop - 1 for s in slices]] = torch.tensor([0.0, 1, 2, 3, 4])
    boxes = torch.tensor([1.0, 1, 2, 2]).expand(1, starts[-1], 4)
    found = generator.eval().predict_proposals(
        HeadPredictions(boxes - 1, logits, None, None), locations, [(64, 64)]
    )[0]
    # One of the size of a cell from each map, whose last centre is half a cell before the border.
    assert found.proposal_boxes.tensor.tolist() == [[32, 32, 64, 64]] + [
        [64 - s / 2, 64 - s / 2, 64, 64] for s in (32, 16, 8, 4)
    ]
    torch.testing.assert_close(found.objectness_logits, torch.tensor([4.0, 3, 2, 1, 0]))


def test_diverged_training_is_named():
    generator = build_generator(["MODEL.PROPOSAL_GENERATOR.PROPOSALS_IN_TRAINING", True])
    torch.nn.init.constant_(generator.head.classification.bias, float("nan"))
    with EventStorage(), pytest.raises(FloatingPointError, match="training has diverged"):
        generator.train()(*make_batch())


def test_maps_are_masked_where_an_image_has_padding(monkeypatch):
    """An image of 100 x 96 pixels beside one of 128 x 96: rows of every map but P6's two."""
    generator = build_generator().eval()
    images, features, _ = make_batch(((128, 96), (100, 96)), ([], []))
    masked = []
    predict = generator.head.predict_initial

    def record(maps, valid, *arguments):
        masked.append([v is not None for v in valid])
        return predict(maps, valid, *arguments)

    monkeypatch.setattr(generator.head, "predict_initial", record)
    generator(images, features)
    # 100 pixels are 25 of 32, 13 of 16, 7 of 8, 4 of 4 and 2 of 2 cells.
    assert masked == [[True, True, True, False, False]]
    images, features, _ = make_batch(((128, 96),), ([],))
    generator(images, features)
    assert masked[1] == [False] * 5
