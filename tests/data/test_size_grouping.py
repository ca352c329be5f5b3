"""Batches of images of like sizes."""

import numpy as np
import pytest
import torch

from d2proposals.data.size_grouping import (
    SizeGroupedBatches,
    choose_like_sizes,
    computed_pixels,
    padded,
)


def make_loader(sizes, per_list=1):
    images = [{"image": torch.empty(0, *size), "number": i} for i, size in enumerate(sizes)]
    return [images[start : start + per_list] for start in range(0, len(images), per_list)]


def numbers(batches):
    return [[image["number"] for image in batch] for batch in batches]


def test_computed_pixels_by_hand():
    assert padded(np.array([[1, 32], [33, 64]])).tolist() == [[32, 32], [64, 64]]
    # Two images in 64 x 96, and one in 32 x 32.
    assert computed_pixels([np.array([[40, 33], [64, 70]]), np.array([[5, 5]])]) == (
        2 * 64 * 96 + 32 * 32
    )


def test_choice_by_hand():
    # With the first image, a landscape, the other landscape wastes least, then the square.
    sizes = np.array([[320, 640], [640, 320], [320, 320], [300, 620], [960, 960]])
    assert choose_like_sizes(sizes, 1) == [0]
    assert choose_like_sizes(sizes, 2) == [0, 3]
    assert choose_like_sizes(sizes, 3) == [0, 3, 2]
    assert sorted(choose_like_sizes(sizes, 5)) == [0, 1, 2, 3, 4]


def test_choice_has_the_least_padding_of_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(100, 1000, (12, 2))
        pairs = [np.array([sizes[0], other]) for other in sizes[1:]]
        waste = [computed_pixels([pair]) - pair.prod(axis=1).sum() for pair in pairs]
        assert choose_like_sizes(sizes, 2)[1] == 1 + int(np.argmin(waste))


def test_the_longest_waiting_image_is_in_every_batch_and_none_is_lost():
    sizes = [(100, 100), (900, 900)] * 6 + [(100, 900)]
    batches = numbers(SizeGroupedBatches(make_loader(sizes), batch_size=2, buffer_size=4))
    assert batches[0] == [0, 2]  # of the first four images, the two small ones
    seen = []
    for batch in batches:
        waiting = min(set(range(13)) - set(seen))
        assert batch[0] == waiting
        seen += batch
    assert len(batches) == 6 and len(set(seen)) == 12  # one image is no batch


@pytest.mark.parametrize("per_list", [1, 3])
def test_a_buffer_of_one_batch_keeps_the_order(per_list):
    sizes = [(100, 200), (900, 200), (300, 300), (40, 40), (500, 500), (60, 60)]
    loader = make_loader(sizes, per_list)
    assert sorted(map(sorted, numbers(SizeGroupedBatches(loader, 3, 3)))) == [[0, 1, 2], [3, 4, 5]]


def test_an_endless_loader_gives_batches_without_end():
    def endless():
        while True:
            yield [{"image": torch.empty(0, 50, 50), "number": 0}]

    iterator = iter(SizeGroupedBatches(endless(), 2, 8))
    assert [len(next(iterator)) for _ in range(5)] == [2] * 5
