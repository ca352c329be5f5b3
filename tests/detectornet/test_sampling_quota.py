"""How the crops of a batch are shared out among its images, by hand and by rules."""

import random

import pytest
import torch

from d2proposals.detectornet.sampling_quota import interleaved, share_out


@pytest.mark.parametrize(
    "supply, wanted, expected",
    [
        ([9, 9, 9], 3, [3, 3, 3]),
        ([0, 9, 9], 4, [0, 6, 6]),  # four are missing: two more of each
        ([0, 9, 9], 3, [0, 5, 4]),  # three are missing: one does not split
        ([1, 5, 100], 4, [1, 5, 6]),  # the second one has but one more
        ([0, 0, 2], 3, [0, 0, 2]),  # there are no more
        ([5], 3, [3]),
        ([], 3, []),
        ([4, 4], 0, [0, 0]),
    ],
)
def test_shares_by_hand(supply, wanted, expected):
    assert share_out(supply, wanted) == expected


def test_shares_by_their_rules():
    random.seed(0)
    for _ in range(300):
        supply = [random.choice([0, 1, 5, 50]) for _ in range(random.randint(1, 16))]
        wanted = random.randint(0, 20)
        given = share_out(supply, wanted)
        assert all(min(has, wanted) <= x <= has for x, has in zip(given, supply, strict=True))
        assert sum(given) == min(sum(supply), wanted * len(supply))
        # Whoever has more to give has given as much as the others, but for a remainder.
        helpers = [x for x, has in zip(given, supply, strict=True) if x < has]
        assert max(given) - min(helpers, default=max(given)) <= 1


def test_each_beginning_has_its_part_of_both():
    first, second = torch.arange(100), 100 + torch.arange(100)
    for fraction in (0.25, 0.5, 0.7):
        mixed = interleaved(first, second, fraction)
        for number in (1, 2, 10, 33, 100):
            assert abs((mixed[:number] < 100).sum() - number * fraction) <= 1
        assert torch.equal(mixed[mixed < 100], first) and torch.equal(mixed[mixed >= 100], second)
    assert interleaved(first[:3], second[:3], 1.0).tolist() == [0, 1, 2, 100, 101, 102]
    assert interleaved(first[:3], second[:3], 0.0).tolist() == [100, 101, 102, 0, 1, 2]
    # Where one ends, the other goes on.
    assert interleaved(first[:1], second[:4], 0.5).tolist() == [0, 100, 101, 102, 103]
    assert interleaved(first[:0, None], second[:2, None], 0.5).tolist() == [[100], [101]]
