import torch
import torch.nn.functional as F

from d2proposals.proposals.image_extent import (
    extend_edges,
    recover_image_sizes,
    resize_valid,
    valid_cells,
)
from tests.common import make_images


def test_recover_image_sizes_of_a_padded_batch():
    sizes = [(64, 96), (33, 70), (1, 1)]
    images = make_images(*sizes)
    assert recover_image_sizes(images.tensor).tolist() == [list(size) for size in sizes]


def test_recover_image_sizes_sees_through_zeros_inside_an_image():
    batch = torch.zeros(2, 3, 8, 8)
    batch[0, 1, 5, 2] = 1.0  # one pixel of one channel: the image reaches at least to it
    assert recover_image_sizes(batch).tolist() == [[6, 3], [1, 1]]


def test_valid_cells_counts_every_cell_that_begins_inside():
    valid = valid_cells(torch.tensor([[17, 8], [1, 32]]), (4, 4), 8, torch.float32)
    assert valid.shape == (2, 1, 4, 4)
    assert valid[0, 0].tolist() == [[1, 0, 0, 0]] * 3 + [[0] * 4]  # ceil(17 / 8) = 3 rows
    assert valid[1, 0].tolist() == [[1, 1, 1, 1]] + [[0] * 4] * 3


def test_resize_valid_is_interpolation_of_the_image_alone():
    torch.manual_seed(0)
    alone = torch.randn(1, 3, 5, 4)
    batched = F.pad(alone, (0, 4, 0, 3), value=7.0)  # what stands in the padding has no effect
    valid = F.pad(torch.ones(1, 1, 5, 4), (0, 4, 0, 3))
    finer = F.pad(torch.ones(1, 1, 10, 8), (0, 8, 0, 6))
    expected = F.interpolate(alone, scale_factor=2, mode="bilinear", align_corners=False)
    result = resize_valid(batched, valid, finer)
    assert torch.allclose(result[..., :10, :8], expected, atol=1e-5)
    assert (result[..., 10:, :] == 0).all() and (result[..., 8:] == 0).all()


def test_resize_valid_shrinks_by_the_mean_of_the_cells_inside():
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    valid = torch.tensor([[1, 1, 1, 0]]).expand(4, 4).reshape(1, 1, 4, 4).float()
    result = resize_valid(maps, valid, torch.ones(1, 1, 2, 2))
    # Left cells: mean of 0, 1, 4, 5. Right cells: column 3 is padding, mean of 2 and 6.
    assert torch.allclose(result[0, 0], torch.tensor([[2.5, 4.0], [10.5, 12.0]]))


def test_edges_are_repeated_over_the_padding():
    maps = torch.arange(32.0).view(2, 1, 4, 4)
    result = extend_edges(maps, [(17, 9), (32, 32)], 8)  # 3 rows, 2 columns; the whole map
    assert result[0, 0].tolist() == [[0, 1, 1, 1], [4, 5, 5, 5], [8, 9, 9, 9], [8, 9, 9, 9]]
    assert torch.equal(result[1], maps[1])
    assert extend_edges(maps, [(25, 30), (32, 31)], 8) is maps
    traced = torch.jit.trace(
        lambda maps, size: extend_edges(maps, [size], 8), (maps[1:], torch.tensor([32, 32]))
    )
    assert torch.equal(traced(maps[:1], torch.tensor([17, 9])), result[:1])
