"""Windows cover the image as in Sec. 5.3; masks of a scale are merged exactly."""

import pytest
import torch

from d2proposals.detectornet.windows import AxisWindows, WindowGrid, make_windows, merge_masks


def test_windows_of_three_scales():
    scales = [x.boxes() for x in make_windows((480, 640))]
    assert [len(x) for x in scales] == [1, 9, 25]  # "usually less than 40"
    assert scales[0].tolist() == [[0, 0, 640, 480]]
    assert scales[1][:3].tolist() == [[0, 0, 320, 240], [160, 0, 480, 240], [320, 0, 640, 240]]
    assert scales[1][-1].tolist() == [320, 240, 640, 480]
    assert scales[2][1].tolist() == [120, 0, 280, 120]


@pytest.mark.parametrize("image_size", [(480, 640), (1, 1), (7, 3000)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_windows_cover_the_image_with_their_overlap(image_size, overlap):
    for scale, (vertical, horizontal) in enumerate(make_windows(image_size, 4, overlap)):
        for (starts, length), side in zip((vertical, horizontal), image_size, strict=True):
            assert length == side / 2**scale
            assert starts[0] == 0 and starts[-1] + length == pytest.approx(side)
            steps = starts.diff()
            assert (steps <= (1 - overlap) * length * (1 + 1e-9)).all()
            # One window fewer would overlap less.
            if len(starts) > 2:
                assert (side - length) / (len(starts) - 2) > (1 - overlap) * length


def merge_at(masks, windows, points):
    """The merged masks at points (x, y), window by window."""
    values = torch.zeros(*masks.shape[1:3], len(points))
    d = masks.shape[-1]
    for mask, (x1, y1, x2, y2) in zip(masks, windows.boxes().tolist(), strict=True):
        for index, (x, y) in enumerate(points.tolist()):
            if y1 < y < y2 and x1 < x < x2:
                i, j = int((y - y1) / (y2 - y1) * d), int((x - x1) / (x2 - x1) * d)
                values[..., index] = torch.maximum(values[..., index], mask[..., i, j])
    return values


@pytest.mark.parametrize("scale, overlap", [(0, 0.2), (1, 0.2), (2, 0.2), (1, 0.6)])
def test_merged_masks_equal_their_twin(scale, overlap):
    size = (24, 37)
    windows = make_windows(size, 3, overlap)[scale]
    torch.manual_seed(0)
    masks = torch.rand(len(windows.boxes()), 2, 5, 5, 5)
    merged = merge_masks(masks, windows)
    # Random points: they lie on no edge.
    points = torch.rand(500, 2, dtype=torch.float64) * torch.tensor([size[1], size[0]])
    x = torch.searchsorted(merged.x_edges, points[:, 0].contiguous()) - 1
    y = torch.searchsorted(merged.y_edges, points[:, 1].contiguous()) - 1
    assert torch.equal(merged.values[..., y, x], merge_at(masks, windows, points))
    assert merged.y_edges[0] == 0 and merged.y_edges[-1] == pytest.approx(size[0])
    assert (merged.y_edges.diff() > 0).all() and (merged.x_edges.diff() > 0).all()


def test_merged_masks_by_hand():
    # Two windows of two cells over [0, 4] and [1, 5]; along the height one window of two cells.
    windows = WindowGrid(
        AxisWindows(torch.zeros(1, dtype=torch.float64), 2.0),
        AxisWindows(torch.tensor([0.0, 1.0], dtype=torch.float64), 4.0),
    )
    first, second = torch.tensor([[1.0, 4.0], [0.0, 0.0]]), torch.tensor([[2.0, 3.0], [5.0, 1.0]])
    masks = torch.stack([first, second])[:, None, None].expand(-1, 1, 5, -1, -1)
    merged = merge_masks(masks, windows)
    assert merged.x_edges.tolist() == [0, 1, 2, 3, 4, 5] and merged.y_edges.tolist() == [0, 1, 2]
    assert merged.values[0, 0].tolist() == [[1, 2, 4, 4, 3], [0, 5, 5, 1, 1]]


def test_the_size_of_merged_masks_does_not_depend_on_the_image():
    masks = torch.rand(25, 1, 5, 24, 24)
    sizes = [
        merge_masks(masks, make_windows(size)[2]).values.numel()
        for size in ((48, 64), (3001, 4003))
    ]
    assert max(sizes) <= 5 * 120**2
