import math

import pytest
import torch
from torchvision.ops import box_iou, nms

from d2proposals.proposals import ranking
from d2proposals.proposals.ranking import (
    first_of_nms,
    multi_threshold_nms,
    probability_to_logit,
    strictly_decreasing,
)


def test_probability_to_logit_is_the_clamped_logit():
    logits = probability_to_logit(torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0, 1.3]))
    top = math.log((1 - 1e-6) / 1e-6)
    expected = [-top, -math.log(3), 0.0, math.log(9), top, top]
    assert torch.allclose(logits, torch.tensor(expected), atol=1e-4)
    assert logits.dtype == torch.float32


def strictly_decreasing_twin(values):
    """The definition, one by one: the largest float not above its input, below the last one."""
    result = []
    for value in values:
        value = torch.tensor(value, dtype=torch.float32)
        if result:
            below = torch.nextafter(result[-1], torch.tensor(-math.inf))
            value = torch.minimum(value, below)
        result.append(value + 0.0)
    return torch.stack(result) if result else torch.zeros(0)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [3.0, 2.0, -1.0],
        [1.0, 1.0, 1.0],
        [0.0, 0.0, -0.0, 0.0],
        [1e-45, 0.0, 0.0, 5.0, -3.0],
        [13.8] * 5 + [2.0, 13.8, -13.8, -13.8, 0.5],
    ],
)
def test_strictly_decreasing_subtracts_the_smallest_amounts(values):
    result = strictly_decreasing(torch.tensor(values))
    assert torch.equal(result, strictly_decreasing_twin(values))
    assert (result[1:] < result[:-1]).all()


def test_strictly_decreasing_keeps_a_strict_order_and_a_thousand_ties_close():
    strict = torch.linspace(13.8, -13.8, 1000)
    assert torch.equal(strictly_decreasing(strict), strict)
    ties = strictly_decreasing(torch.full((2000,), -13.8))
    assert (ties[1:] < ties[:-1]).all() and (ties + 13.8).abs().max() < 3e-3


def multi_threshold_twin(boxes, scores, thresholds, topks):
    """The ranking as its docstring tells it, with plain lists."""
    loosest = nms(boxes, scores, thresholds[0])[: topks[0]].tolist()
    sets = []
    for threshold in thresholds:
        kept = []
        for i in loosest:
            if all(box_iou(boxes[i, None], boxes[j, None]) <= threshold for j in kept):
                kept.append(i)
        sets.append(kept)
    ranked = []
    for kept, topk in zip(reversed(sets), reversed(topks), strict=True):
        new = [i for i in kept if i not in ranked]
        ranked += new[: max(topk - len(ranked), 0)]
    return ranked


def random_boxes(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(number, 2, generator=generator) * 60
    return torch.cat([corner, corner + 10 + torch.rand(number, 2, generator=generator) * 40], 1)


def test_multi_threshold_nms_equals_its_plain_twin():
    boxes, scores = random_boxes(80), torch.randperm(80).float()
    settings = (0.9, 0.7, 0.5, 0.3), (60, 30, 10, 4)
    ranked = multi_threshold_nms(boxes, scores, *settings).tolist()
    assert ranked == multi_threshold_twin(boxes, scores, *settings)
    assert len(set(ranked)) == len(ranked)


@pytest.mark.parametrize("limit", [0, 3, 12, 60, 500])
def test_a_limit_gives_the_beginning_of_the_whole_ranking(limit):
    boxes, scores = random_boxes(300, seed=2), torch.randperm(300).float()
    settings = (0.9, 0.7, 0.5, 0.3), (200, 60, 20, 5)
    everything = multi_threshold_nms(boxes, scores, *settings)
    assert torch.equal(
        multi_threshold_nms(boxes, scores, *settings, limit=limit), everything[:limit]
    )


def plain_multi_threshold_nms(boxes, scores, thresholds, topks):
    """All of S_1, then every S_i: what the lazy ranking must not differ from."""
    order = scores.argsort(descending=True, stable=True)
    order = order[nms(boxes[order], -torch.arange(len(order)).float(), thresholds[0])[: topks[0]]]
    ranked = []
    for threshold, topk in zip(reversed(thresholds), reversed(topks), strict=True):
        kept = nms(boxes[order], -torch.arange(len(order)).float(), threshold)[:topk].tolist()
        seen = set(ranked)
        ranked += [i for i in kept if i not in seen][: max(topk - len(ranked), 0)]
    return order[ranked]


@pytest.mark.parametrize("spread", [400, 60, 5])
@pytest.mark.parametrize("limit", [1, 7, 30, 90, 200, None])
def test_the_lazy_ranking_is_the_plain_one(spread, limit):
    """Scattered, clustered, and so close that the strict sets run dry."""
    generator = torch.Generator().manual_seed(spread)
    corner = torch.rand(900, 2, generator=generator) * spread
    boxes = torch.cat([corner, corner + 8 + torch.rand(900, 2, generator=generator) * 60], 1)
    scores = torch.rand(900, generator=generator).round(decimals=2)  # with ties
    settings = (0.9, 0.8, 0.7, 0.6, 0.5), (300, 100, 50, 20, 8)
    plain = plain_multi_threshold_nms(boxes, scores, *settings)
    assert torch.equal(multi_threshold_nms(boxes, scores, *settings, limit=limit), plain[:limit])


@pytest.mark.parametrize("limit", [1, 7, 30, 90, 200, None])
def test_a_traced_ranking_is_the_plain_one_for_other_numbers_of_boxes(limit):
    settings = (0.9, 0.8, 0.7, 0.6, 0.5), (300, 100, 50, 20, 8)
    traced = torch.jit.trace(
        lambda *inputs: multi_threshold_nms(*inputs, *settings, limit=limit),
        (random_boxes(50), torch.rand(50)),
        check_trace=False,
    )
    for number, seed in ((900, 1), (40, 2), (7, 3), (1, 4)):
        boxes, scores = random_boxes(number, seed), torch.rand(number).round(decimals=2)
        plain = plain_multi_threshold_nms(boxes, scores, *settings)
        assert torch.equal(traced(boxes, scores), plain[:limit]), number


def test_a_trace_lowers_scores_to_those_before_them():
    traced = torch.jit.trace(strictly_decreasing, torch.rand(3), check_trace=False)
    result = traced(torch.tensor([2.0, 3.0, 1.0, 1.0, -4.0, 0.5]))
    assert result.tolist() == [2, 2, 1, 1, -4, -4]
    assert traced(torch.zeros(0)).shape == (0,)


def test_the_lazy_ranking_looks_at_a_beginning_of_the_list(monkeypatch):
    seen = []
    nms_of = ranking.nms
    monkeypatch.setattr(ranking, "nms", lambda b, *rest: seen.append(len(b)) or nms_of(b, *rest))
    boxes, scores = random_boxes(3000) * torch.tensor([9.0, 9, 9, 9]), torch.rand(3000)
    multi_threshold_nms(boxes, scores, (0.9, 0.7, 0.5), (2000, 300, 50), limit=100)
    assert max(seen) <= 400  # of 3,000


@pytest.mark.parametrize("number", [1, 5, 40, 1000])
def test_first_of_nms_is_the_beginning_of_nms(number):
    boxes = random_boxes(400, seed=3)
    everything = nms(boxes, -torch.arange(400.0), 0.2)
    assert torch.equal(first_of_nms(boxes, 0.2, number), everything[:number])


def test_multi_threshold_nms_hand_worked():
    # 0 and 1 overlap with IoU .8, 2 stands apart. The strict set holds 0 and 2, so that the
    # weaker 2 comes before the stronger 1.
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60]], dtype=torch.float32)
    scores = torch.tensor([0.9, 0.8, 0.1])
    assert multi_threshold_nms(boxes, scores, (0.9, 0.5), (3, 2)).tolist() == [0, 2, 1]
    assert multi_threshold_nms(boxes, scores, (0.9, 0.5), (3, 1)).tolist() == [0, 1, 2]
    assert multi_threshold_nms(boxes, scores, (0.7, 0.5), (3, 2)).tolist() == [0, 2]


def test_multi_threshold_nms_of_nothing_and_of_equal_scores():
    empty = multi_threshold_nms(torch.zeros(0, 4), torch.zeros(0), (0.9, 0.5), (10, 5))
    assert empty.shape == (0,)
    apart = torch.tensor([[i * 20.0, 0, i * 20 + 10, 10] for i in range(5)])
    assert multi_threshold_nms(apart, torch.ones(5), (0.9,), (10,)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "thresholds, topks", [((0.5, 0.9), (10, 5)), ((0.9, 0.5), (5, 10)), ((0.9,), (5, 3)), ((), ())]
)
def test_multi_threshold_nms_names_bad_settings(thresholds, topks):
    with pytest.raises(ValueError, match="both decreasing"):
        multi_threshold_nms(random_boxes(3), torch.rand(3), thresholds, topks)
